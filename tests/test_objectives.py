from __future__ import annotations

import math

import pytest
import torch

from esd.errors import UserError
from esd.objectives import Objective, loss, target, weight

TYPES = ("epsilon", "v_prediction", "flow")


def scales(prediction_type: str, b: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """α, σ (b,) of the path the prediction type belongs to, away from its ends."""
    u = torch.linspace(0.1, 0.9, b, dtype=torch.float64)
    if prediction_type == "flow":
        return 1 - u, u
    return torch.cos(u * math.pi / 2), torch.sin(u * math.pi / 2)


def draws(n: int, b: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(b, 4, 6, 8, generator=generator, dtype=torch.float64) for _ in range(n)]


def test_eta_zero_returns_the_anchor() -> None:
    anchor, concept, null = draws(3)
    assert torch.equal(target(anchor, concept, null, eta=0.0), anchor.float())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_coefficients_of_the_target_sum_to_one(eta: float) -> None:
    same = draws(1)[0].float()
    shifted = target(same + 2, same + 2, same + 2, eta=eta)
    torch.testing.assert_close(shifted, same + 2)


def test_target_moves_away_from_the_concept() -> None:
    _, concept, null = draws(3)
    moved = target(null, concept, null, eta=1.0)
    torch.testing.assert_close(moved - null.float(), -(concept - null).float())


def test_eta_with_the_concept_as_anchor_is_one_plus_eta_with_null() -> None:
    _, concept, null = draws(3)
    torch.testing.assert_close(
        target(concept, concept, null, eta=2.0), target(null, concept, null, eta=1.0), atol=1e-5, rtol=1e-5
    )


def test_target_is_float32_from_half_precision() -> None:
    anchor, concept, null = (tensor.bfloat16() for tensor in draws(3))
    assert target(anchor, concept, null, eta=1.0).dtype == torch.float32


def to_eps(
    prediction: torch.Tensor, x: torch.Tensor, kind: str, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The noise ε (b, ...) that a prediction at x (b, ...) implies; α and σ are (b,)."""
    a, s = (scale.view(-1, 1, 1, 1).to(x) for scale in (alpha, sigma))
    return {"epsilon": prediction, "v_prediction": a * prediction + s * x, "flow": x + a * prediction}[kind]


@pytest.mark.parametrize("kind", TYPES)
def test_conversion_finds_the_noise_that_made_x(kind: str) -> None:
    clean, eps = draws(2)
    alpha, sigma = scales(kind)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    x = a * clean + s * eps
    prediction = {"epsilon": eps, "v_prediction": a * eps - s * clean, "flow": eps - clean}[kind]
    torch.testing.assert_close(to_eps(prediction, x, kind, alpha, sigma), eps)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_target_commutes_with_the_parametrisation(kind: str, eta: float) -> None:
    anchor, concept, null, x = draws(4)
    alpha, sigma = scales(kind)
    in_eps = target(*(to_eps(p, x, kind, alpha, sigma) for p in (anchor, concept, null)), eta=eta)
    native = target(anchor, concept, null, eta=eta)
    torch.testing.assert_close(to_eps(native, x.float(), kind, alpha, sigma), in_eps, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_eps_weighting_makes_the_native_loss_the_eps_loss(kind: str) -> None:
    prediction, goal, x = draws(3)
    alpha, sigma = scales(kind)
    in_eps = loss(to_eps(prediction, x, kind, alpha, sigma), to_eps(goal, x, kind, alpha, sigma))
    weighted = loss(prediction, goal, weight("eps", kind, alpha, sigma))
    torch.testing.assert_close(weighted, in_eps, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_x0_weighting_makes_the_native_loss_the_x0_loss(kind: str) -> None:
    prediction, goal, x = draws(3)
    alpha, sigma = scales(kind)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    clean = [(x - s * to_eps(p, x, kind, alpha, sigma)) / a for p in (prediction, goal)]
    weighted = loss(prediction, goal, weight("x0", kind, alpha, sigma))
    torch.testing.assert_close(weighted, loss(*clean), atol=1e-4, rtol=1e-4)


def test_v_loss_at_the_noisy_end_is_the_eps_loss_over_alpha_bar() -> None:
    alpha_bar = torch.tensor([0.00466])  # Stable Diffusion at t = 999: a factor of 215
    factor = weight("eps", "v_prediction", alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    assert 1 / factor.item() == pytest.approx(214.6, rel=1e-3)


def test_weights_stay_finite_at_zero_terminal_snr() -> None:
    alpha, sigma = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    for weighting in ("native", "eps", "v", "x0", "min_snr"):
        assert weight(weighting, "v_prediction", alpha, sigma).isfinite().all()
    torch.testing.assert_close(weight("v", "v_prediction", alpha, sigma), torch.ones(2))


def test_min_snr_is_the_x0_error_with_snr_capped_at_five() -> None:
    alpha, sigma = scales("epsilon")
    snr = (alpha / sigma).square().float()
    expected = snr.clamp_max(5) * weight("x0", "epsilon", alpha, sigma)
    torch.testing.assert_close(weight("min_snr", "epsilon", alpha, sigma), expected)


def test_loss_weights_samples_not_pixels() -> None:
    prediction, goal = (tensor.float() for tensor in draws(2))
    weights = torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5])
    by_hand = sum(w * (p - g).square().mean() for w, p, g in zip(weights, prediction, goal, strict=True)) / 5
    torch.testing.assert_close(loss(prediction, goal, weights), by_hand)


def test_loss_sends_no_gradient_into_the_target() -> None:
    prediction, goal = (tensor.float().requires_grad_() for tensor in draws(2))
    loss(prediction, goal).backward()
    assert prediction.grad is not None
    assert goal.grad is None


def test_shapes_that_would_broadcast_are_refused() -> None:
    prediction = torch.zeros(3, 4, 2, 2)
    with pytest.raises(ValueError, match="target"):
        loss(prediction, prediction[:1])
    with pytest.raises(ValueError, match="weight"):
        loss(prediction, prediction, torch.ones(1))


@pytest.mark.parametrize(
    "wrong", [{"eta": float("nan")}, {"eta": -1.0}, {"eta": math.inf}, {"anchor": "cat"}, {"weighting": "p2"}]
)
def test_objective_names_the_value_and_what_is_allowed(wrong: dict) -> None:
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        Objective(**wrong)
