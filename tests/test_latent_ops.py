"""Latents are blended with the source's outside of a mask, and follow the gradient of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from esd.errors import UserError
from esd.interventions import (
    AttentionEdit,
    Guide,
    Latents,
    LocalBlend,
    Op,
    Source,
    attach,
    sample,
)
from esd.trajectory import clean, first_stages
from tests.families import TEXT, close, drawn, every, make, shared

A, B = "a cat", "the dog"


@every
def test_a_blend_of_all_is_the_edit_and_of_nothing_the_source(name: str) -> None:
    def blended(threshold: float, **how: Any) -> Tensor:
        return drawn(
            name, LocalBlend(TEXT[name], source=Source(B, 1), words=["cat", "dog"], threshold=threshold, **how)
        )

    edited, source = drawn(name), drawn(name, prompts=[B], seeds=[1])
    assert close(blended(0.0), edited) and close(blended(1.0), source) and not close(edited, source)
    assert not close(blended(1.0, steps=(0, 2)), source)  # the last step is not blended


def test_a_blend_takes_each_place_from_the_edit_or_from_the_source() -> None:
    family = shared("sd1")
    last: Any = {"words": ["cat", "dog"], "steps": (2, 3), "rows": (0,), "source": 1}
    plain = drawn("sd1", prompts=[A, B], seeds=[0, 1])
    masks = {}
    for threshold in (0.5, 0.9, 0.97):
        mixed = drawn("sd1", LocalBlend("cross", threshold=threshold, **last), prompts=[A, B], seeds=[0, 1])
        assert torch.equal(mixed[1], plain[1])
        ours = (mixed[0] == plain[0]).all(0)
        assert torch.equal(torch.where(ours, plain[0], plain[1]), mixed[0])
        masks[threshold] = ours
    assert masks[0.5].all() and not masks[0.97].all() and masks[0.97].any()
    assert not (masks[0.97] & ~masks[0.9]).any()  # a higher threshold keeps less
    assert family.sample_shape[1:] == masks[0.9].shape


def red(image: Tensor) -> Tensor:
    """How far a picture is from red."""
    return (image[:, 0] - 0.9).abs().mean() + image[:, 1:].abs().mean()


@every
def test_guidance_lowers_its_loss_and_only_in_its_rows_and_steps(name: str) -> None:
    family = shared(name)
    plain = drawn(name, prompts=[A, B], seeds=[0, 1])
    guided = drawn(name, Guide(loss=red, scale=30.0, rows=(1,)), prompts=[A, B], seeds=[0, 1])
    assert torch.equal(guided[0], plain[0])
    before, after = (float(red(family.decode(latents[1:]))) for latents in (plain, guided))
    assert after < before
    assert close(drawn(name, Guide(loss=red, scale=30.0), prompts=[B], seeds=[1]), guided[1:])  # whatever the batch
    some = sample(family, [A], [0], Guide(loss=red, scale=30.0, steps=(1, 3)), num_steps=3, guidance_scale=3.0)
    none = sample(family, [A], [0], num_steps=3, guidance_scale=3.0)
    same = [torch.equal(*pair) for pair in zip(some.trajectory.latents, none.trajectory.latents, strict=True)]
    assert same == [entry < first_stages(family.scheduler(3))[1] for entry in range(len(same))]


def test_guidance_is_the_same_step_however_a_solver_scales_its_latents() -> None:
    """DDIM is Euler's method on x / alpha; at the same times both draw the same, guided or not."""
    family = make("sd1")
    config = family.pipe.scheduler.config
    family.pipe.scheduler = DDIMScheduler.from_config(config, timestep_spacing="leading", set_alpha_to_one=True)
    plain, guided = (
        [drawn("sd1", *ops, family=family, scheduler=solver) for solver in ("ddim", "euler")]
        for ops in ((), (Guide(loss=red, scale=100.0),))
    )
    assert close(*plain) and close(*guided) and not close(plain[0], guided[0])


@dataclass(frozen=True, kw_only=True)
class Note(Op):
    """Writes down when it is called."""

    calls: list[tuple[str, int | None, float]]

    def before_step(self, latents: Latents) -> None:
        self.calls.append(("before", latents.moment.step, float(latents.t)))

    def after_step(self, latents: Latents) -> None:
        self.calls.append(("after", latents.moment.step, float(latents.t)))


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "pndm", "dpm++"])
def test_latents_come_by_before_and_after_every_step_once(solver: str) -> None:
    note = Note(calls=[])
    drawn("sd1", note, scheduler=solver)
    assert [call[:2] for call in note.calls] == [(when, step) for step in range(3) for when in ("before", "after")]
    some = Note(calls=[], steps=(1, 2))
    drawn("sd1", some, scheduler=solver)
    assert [call[:2] for call in some.calls] == [("before", 1), ("after", 1)]


@every
def test_what_is_predicted_makes_clean_latents(name: str) -> None:
    """Of the true noise, velocity or flow, x0_hat is the latents that it was added to."""
    family = shared(name)
    x0, noise = (family.initial_noise([torch.Generator().manual_seed(seed)]) for seed in (0, 1))
    t = torch.tensor(300.0)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in family.alpha_sigma(t.expand(1)))
    said = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[family.prediction_type]
    assert close(clean(family, alpha * x0 + sigma * noise, t, said), x0)


BAD: dict[str, Any] = {
    "give the words": lambda: LocalBlend("cross", source=Source(B, 0)),
    "allowed: 0 to 1": lambda: LocalBlend("cross", source=Source(B, 0), words=["cat"], threshold=2.0),
    "reads no text": lambda: LocalBlend("self", source=Source(B, 0), words=["cat"]),
    "'the dog' has none of the words cat": lambda: LocalBlend("cross", source=Source(B, 0), words=["cat"]),
    "has maps of 8": lambda: LocalBlend("cross", source=Source(B, 0), words=["cat", "dog"], resolution=3),
    r"Guide\(scale=nan\)": lambda: Guide(loss=red, scale=float("nan")),
    "whole number of steps": lambda: Guide(loss=red, scale=1.0, every=1.5),  # type: ignore[arg-type]
    r"LocalBlend\(threshold=nan\)": lambda: LocalBlend(
        "cross", source=Source(B, 0), words=["cat"], threshold=float("nan")
    ),
    r"none of steps=\(1, 2\) is a multiple": lambda: Guide(loss=red, scale=1.0, every=2, steps=(1, 2)),
    "a scale other than 0": lambda: Guide(loss=red, scale=0.0),
    "leave `on`": lambda: Guide(loss=red, scale=1.0, on="cond"),
    "no gradient flows": lambda: Guide(loss=lambda image: image.mean().detach(), scale=1.0),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_work_is_refused_in_words(message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawn("sd1", BAD[message]())


def test_a_stock_pipeline_is_refused_for_it_does_not_show_its_latents() -> None:
    family = shared("sd1")
    with pytest.raises(UserError, match="between steps"), attach(family, Guide(loss=red, scale=1.0)):
        family.pipe(A, num_inference_steps=1, output_type="latent")
    edit = AttentionEdit("cross", source=Source(B, 0))
    with pytest.raises(UserError, match="sample puts it there"), attach(family, edit):
        pass
