from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esd.errors import UserError
from esd.families import Family, family_of
from esd.weights import WeightViews
from tests import tiny


def batch(family: Family, b: int = 3) -> tuple[Tensor, Tensor, Any]:
    noise = family.initial_noise([torch.Generator().manual_seed(i) for i in range(b)])
    return noise, torch.linspace(1, 999, b).long(), family.encode(["a cat", "dog", ""])[torch.arange(b) % 3]


def trained(family: Family, expression: str, steps: int = 2) -> WeightViews:
    """Views after a few updates of the selected parameters."""
    views = WeightViews(family.denoiser, family.select(expression).names)
    x, t, cond = batch(family)
    optimiser = torch.optim.AdamW(views.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=family.dtype == torch.bfloat16):
            prediction = family.predict(views.student, x, t, cond)
        prediction.square().mean().backward()
        optimiser.step()
    return views


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("expression", ["esd_x", "esd_u", "esd_all"])
def test_the_teacher_is_the_base_bit_for_bit_after_updates(expression: str, checkpointing: bool) -> None:
    family = family_of(tiny.pipeline(size="large" if checkpointing else "small"))
    base = copy.deepcopy(family.denoiser)
    if checkpointing:
        family.denoiser.enable_gradient_checkpointing()
        family.denoiser.train()
    x, t, cond = batch(family)
    expected = family.predict(base, x, t, cond)
    views = trained(family, expression)
    assert torch.equal(family.predict(views.teacher, x, t, cond), expected)
    assert not torch.equal(family.predict(views.student, x, t, cond), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_calling_the_teacher_between_forward_and_backward_leaves_the_gradients_alone(
    checkpointing: bool,
) -> None:
    family, plain = family_of(tiny.pipeline()), family_of(tiny.pipeline())
    names = family.select("esd_u").names
    views = WeightViews(family.denoiser, names)
    for denoiser in (family.denoiser, plain.denoiser):
        denoiser.train()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.mul_(1.01)
    if checkpointing:
        family.denoiser.enable_gradient_checkpointing()
    x, t, cond = batch(family)
    prediction = family.predict(views.student, x, t, cond)
    family.predict(views.teacher, x, t, cond)
    prediction.square().mean().backward()
    plain.predict(plain.denoiser, x, t, cond).square().mean().backward()
    reference = dict(plain.denoiser.named_parameters())
    for name, parameter in views.named_parameters().items():
        torch.testing.assert_close(parameter.grad, reference[name].grad, msg=name)


def test_the_teacher_records_no_gradient() -> None:
    family = family_of(tiny.pipeline())
    views = WeightViews(family.denoiser, family.select("esd_x").names)
    assert not family.predict(views.teacher, *batch(family)).requires_grad


def test_under_autocast_the_teacher_is_bit_for_bit_what_the_base_says_there() -> None:
    family = family_of(tiny.pipeline())
    base = copy.deepcopy(family.denoiser)
    views = trained(family, "esd_x")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = family.predict(base, *batch(family))
        assert torch.equal(family.predict(views.teacher, *batch(family)), rounded)
    assert not torch.equal(family.predict(views.teacher, *batch(family)), rounded)


@pytest.mark.parametrize("expression", ["esd_x", "esd_x_strict", "esd_u", "up.self"])
def test_only_the_selected_parameters_change(expression: str) -> None:
    family = family_of(tiny.pipeline())
    base = copy.deepcopy(dict(family.denoiser.named_parameters()))
    views = trained(family, expression)
    for name, parameter in family.denoiser.named_parameters():
        assert torch.equal(parameter, base[name]) != (name in views.names), name
        assert parameter.requires_grad == (name in views.names)


def test_differences_are_student_minus_base() -> None:
    family = family_of(tiny.pipeline())
    base = copy.deepcopy(dict(family.denoiser.named_parameters()))
    views = trained(family, "esd_x")
    differences = views.differences()
    assert tuple(differences) == views.names
    for name, difference in differences.items():
        assert difference.dtype == torch.float32
        assert torch.equal(difference, dict(family.denoiser.named_parameters())[name] - base[name])
        assert torch.equal(views.base[name], base[name])


def test_restore_puts_everything_back() -> None:
    family = family_of(tiny.pipeline())
    base = {name: (p.clone(), p.requires_grad) for name, p in family.denoiser.named_parameters()}
    trained(family, "esd_u").restore()
    for name, parameter in family.denoiser.named_parameters():
        assert torch.equal(parameter, base[name][0])
        assert parameter.requires_grad == base[name][1]
        assert parameter.grad is None


def test_values_come_back_exactly() -> None:
    family = family_of(tiny.pipeline())
    views = trained(family, "esd_x")
    values = views.values()
    other = family_of(tiny.pipeline())
    resumed = WeightViews(other.denoiser, views.names)
    resumed.load_values(values)
    for name, parameter in resumed.named_parameters().items():
        assert torch.equal(parameter, values[name])
    with pytest.raises(UserError, match="same selection"):
        resumed.load_values(dict(list(values.items())[1:]))


@pytest.mark.parametrize("expression", ["esd_x", "esd_u"])
def test_a_bf16_base_gets_float32_masters_and_an_untouched_teacher(expression: str) -> None:
    pipe = tiny.pipeline().to(torch.bfloat16)
    family, base = family_of(pipe), copy.deepcopy(pipe.unet)
    x, t, cond = batch(family)
    expected = family.predict(base, x, t, cond)
    views = trained(family, expression, steps=1)
    assert all(p.dtype == torch.float32 for p in views.parameters())
    assert all(p.isfinite().all() for p in views.parameters())
    assert torch.equal(family.predict(views.teacher, x, t, cond), expected)
    smallest = min(d.abs().max().item() for d in views.differences().values() if d.any())
    assert smallest < 2e-3  # bf16 weights could not have moved by this little
    views.restore()
    assert all(p.dtype == torch.bfloat16 for p in pipe.unet.parameters())


def test_without_masters_a_bf16_base_learns_in_bf16_and_loses_small_steps() -> None:
    moved = {}
    for masters in (True, False):
        family = family_of(tiny.pipeline().to(torch.bfloat16))
        views = WeightViews(family.denoiser, family.select("esd_x").names, masters)
        assert all(p.dtype == (torch.float32 if masters else torch.bfloat16) for p in views.parameters())
        adam = torch.optim.Adam(views.parameters(), lr=1e-5)
        for parameter in views.parameters():
            parameter.grad = torch.ones_like(parameter)
        adam.step()
        differences = torch.cat([difference.flatten() for difference in views.differences().values()])
        moved[masters] = float((differences != 0).float().mean())
        assert views.pull(0.0) == pytest.approx(float(differences.norm()), rel=1e-5)
        assert views.pull(0.5) < views.pull(0.0) + 1e-9
        views.restore()
        base = family_of(tiny.pipeline().to(torch.bfloat16)).denoiser.state_dict()
        assert all(torch.equal(value, base[name]) for name, value in family.denoiser.state_dict().items())
    assert moved[True] == 1 and 0 < moved[False] < 0.5


def test_names_the_module_lacks_are_refused_before_anything_changes() -> None:
    module = nn.Linear(2, 3)
    for names in (["weight", "wieght"], []):
        with pytest.raises(UserError, match="parameter"):
            WeightViews(module, names)
        assert all(p.requires_grad for p in module.parameters())
