"""The authors' programs, target for target: each experiment against a loop written from its published formula.

Here nothing of `esd` computes what is expected but the draws of noise, sample and time. The columns are those of
CompVis' train-esd.py (a2189e9), alt_esd_diffusers.py and esd_sd.py (25613d2) of rohitgandikota/erasing; and those
whose x_t the stock pipeline draws, esd_sdxl.py and the FLUX scripts of its rewrite (2ff19a1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from torch import Tensor

from esd import learner, objectives, seeding
from esd.config.train import TrainConfig
from esd.families import family_of
from esd.train import make_plan
from esd.weights import WeightViews
from tests import tiny
from tests.programs import composed

STEPS, GUIDANCE, TOTAL, SEED = 10, 3.0, 1000, 7
WIDTH = TOTAL // STEPS
TWICE = 801  # PNDM evaluates its second time twice; the label alone does not tell which of the two points it is
Predict = Callable[..., tuple[Tensor, ...]]  # of x, t and prompts: one prediction for each prompt


def alpha_sigma(t: float) -> tuple[float, float]:
    """Of Stable Diffusion: square roots of the running product of 1 - beta, beta's square root linear in t."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, TOTAL)
    product = float((1 - roots**2).cumprod(0)[int(t)])
    return math.sqrt(product), math.sqrt(1 - product)


def ddim(predict: Predict, x: Tensor, levels: list[int], prompt: str) -> Tensor:
    """x at the last of the levels, by guided steps from each to the next (DDIM, eta 0)."""
    for t, below in pairwise(levels):
        null, cond = predict(x, t, "", prompt)
        eps = null + GUIDANCE * (cond - null)
        (a, s), (a_below, s_below) = alpha_sigma(t), alpha_sigma(below)
        x = a_below * (x - s * eps) / a + s_below * eps
    return x


def compvis(predict: Predict, x: Tensor, t: float, prompt: str) -> Tensor:
    """The first of the levels 1, 101, ... is left out at the top; x stops two bins below the one its label is in."""
    bin_of_label = int(t) // WIDTH
    levels = [1 + WIDTH * k for k in range(STEPS - 1)][::-1]
    stop = 1 + WIDTH * (bin_of_label - 2)
    if bin_of_label >= 2:
        return ddim(predict, x, levels[: levels.index(stop) + 1], prompt)
    return ddim(predict, x, [*levels, 0], prompt)  # all steps; the last goes to the first training time


def alt(predict: Predict, x: Tensor, t: float, prompt: str) -> Tensor:
    """k steps from the top; the label is T - k T/n, above x's own level T - (k + 1) T/n + 1."""
    k = round((TOTAL - t) / WIDTH)
    levels = [1 + WIDTH * level for level in range(STEPS)][::-1]
    return ddim(predict, x, levels[: k + 1], prompt)


def pndm(predict: Predict, x: Tensor, t: float, prompt: str) -> Tensor:
    """The model's own sampler up to its step at t."""
    solver = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    solver.set_timesteps(STEPS)
    for time in solver.timesteps.tolist():
        if time == t:
            return x
        null, cond = predict(x, time, "", prompt)
        x = solver.step(null + GUIDANCE * (cond - null), time, x, return_dict=False)[0]
    raise AssertionError(f"{t} is none of the sampler's times")


COLUMNS: dict[str, tuple[Callable[[Predict, Tensor, float, str], Tensor], str, float, str]] = {
    "upstream_compvis": (compvis, "null", 1.0, "student"),
    "upstream_alt": (alt, "null", 2.0, "student"),
    "upstream_2025": (pndm, "concept", 2.0, "teacher"),
}


def predictor(pipe: Any, unet: torch.nn.Module) -> Predict:
    @torch.no_grad()
    def predict(x: Tensor, t: float, *prompts: str) -> tuple[Tensor, ...]:
        states = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in prompts])
        return unet(torch.cat([x] * len(prompts)), torch.tensor(t), encoder_hidden_states=states).sample.split(1)

    return predict


@pytest.mark.parametrize("experiment", COLUMNS)
@pytest.mark.parametrize("erase_from", [None, "dog"])
def test_points_and_targets_are_those_of_the_published_formula(experiment: str, erase_from: str | None) -> None:
    walk, anchor, eta, sampler = COLUMNS[experiment]
    pipe = tiny.pipeline()
    base = copy.deepcopy(pipe.unet)
    settings = [f"experiment={experiment}", "concepts=[cat]", f"trajectory.num_steps={STEPS}", "trajectory.size=16"]
    if erase_from:
        settings.append(f"erase_from=[{erase_from}]")
    config = composed("train", [*settings, f"seed={SEED}"])
    assert isinstance(config, TrainConfig)
    config.check()
    family, plan = family_of(pipe), make_plan(config, None)
    views = WeightViews(family.denoiser, family.select(plan.selection).names)
    with torch.no_grad():
        for number, parameter in enumerate(views.parameters()):
            parameter.add_(0.05 * seeding.normal([seeding.generator(SEED, "moved", number)], parameter.shape)[0])
    erasing, _ = learner.point_sources(family, plan, views.student, views.teacher, 1)
    teacher, student = predictor(pipe, base), predictor(pipe, pipe.unet)

    for step in range(8):
        points = erasing.points(step, [0])
        if walk is pndm and float(points.t[0]) == TWICE:
            continue
        noise = seeding.normal([seeding.generator(SEED, "noise", step, 0)], (4, 8, 8))
        t, told = float(points.t[0]), erase_from or "cat"
        rolled = "cat" if experiment == "upstream_alt" else told
        x = walk(student if sampler == "student" else teacher, noise, t, rolled)
        torch.testing.assert_close(points.x, x, atol=1e-5, rtol=0)  # as the steps' roundings add up
        cat, null, *origin = teacher(points.x, t, "cat", "", *([erase_from] if erase_from else []))
        expected = (origin[0] if origin else {"null": null, "concept": cat}[anchor]) - eta * (cat - null)
        ours = objectives.target(
            points.prediction(plan.objective.anchor), points.concept, points.prediction("null"), eta=plan.objective.eta
        )
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert Path(config.model.path).name == "stable-diffusion-v1-4"


@pytest.mark.parametrize("erase_from", [None, "dog"])
def test_sdxl_points_are_the_stock_pipelines_own_latents_and_targets_start_from_what_it_drew(
    erase_from: str | None,
) -> None:
    pipe, drawn = tiny.every("sdxl"), erase_from or "cat"
    base = copy.deepcopy(pipe.unet)
    steps = [f"trajectory.num_steps={STEPS}", "trajectory.size=16", f"seed={SEED}"]
    steps += [f"erase_from=[{erase_from}]"] if erase_from else []
    config = composed("train", ["experiment=upstream_2025_sdxl", "concepts=[cat]", *steps])
    assert isinstance(config, TrainConfig)
    config.check()
    family, plan = family_of(pipe), make_plan(config, None)
    views = WeightViews(family.denoiser, family.select(plan.selection).names)
    erasing, _ = learner.point_sources(family, plan, views.student, views.teacher, 1)
    states, _, pooled, _ = pipe.encode_prompt([drawn, "cat", ""], device="cpu", do_classifier_free_guidance=False)
    ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 3)  # a whole picture of its own size
    met = set()
    for step in range(6):
        points = erasing.points(step, [0])
        noise = seeding.normal([seeding.generator(SEED, "noise", step, 0)], (4, 8, 8))
        path = [noise * pipe.scheduler.init_noise_sigma]

        def keep(_pipe: Any, _step: int, _time: Any, latents: dict[str, Tensor], path: list[Tensor] = path) -> Any:
            path.append(latents["latents"])
            return latents

        pipe(
            prompt=drawn, num_inference_steps=STEPS, guidance_scale=2.0, height=16, width=16, latents=noise,
            output_type="latent", callback_on_step_end=keep,
        )  # fmt: skip
        at = pipe.scheduler.timesteps.tolist().index(float(points.t[0]))
        met.add(at)
        torch.testing.assert_close(points.x, path[at], atol=1e-6, rtol=0)
        with torch.no_grad():
            start, cat, null = base(
                points.x.repeat(3, 1, 1, 1),
                points.t[0],
                states,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
            ).sample.split(1)
        ours = objectives.target(
            points.prediction(plan.objective.anchor), points.concept, points.prediction("null"), eta=plan.objective.eta
        )
        torch.testing.assert_close(ours, start - 1.0 * (cat - null), atol=1e-6, rtol=0)
    assert len(met) > 2


FLUX_STEPS, FLUX_GUIDANCE = 5, 3.5


def flux_tokens(x: Tensor) -> Tensor:
    """(b, c, h, w) as FLUX.1 reads it: a token of every 2 x 2 cell, (b, h / 2 * w / 2, 4 c)."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def klein_tokens(x: Tensor) -> Tensor:
    """(b, c, h, w) as FLUX.2 reads it: a token of every place, (b, h w, c)."""
    return x.flatten(2).transpose(1, 2)


def flux_said(pipe: Any, transformer: Any, x: Tensor, t: float, texts: list[str]) -> Tensor:
    """What FLUX.1-dev says of each text, told guidance 1, as tokens (texts, n, d)."""
    states, pooled, text_ids = pipe.encode_prompt(texts, texts, device="cpu", max_sequence_length=tiny.TOKENS)
    h, w = x.shape[2] // 2, x.shape[3] // 2
    places = torch.tensor([[0.0, row, column] for row in range(h) for column in range(w)])
    return transformer(
        flux_tokens(x).repeat(len(texts), 1, 1), states, pooled, torch.full((len(texts),), t / 1000), places, text_ids,
        torch.ones(len(texts)),
    ).sample  # fmt: skip


def klein_said(pipe: Any, transformer: Any, x: Tensor, t: float, texts: list[str]) -> Tensor:
    """What FLUX.2 Klein says of each text, as tokens (texts, n, d)."""
    states, text_ids = pipe.encode_prompt(texts, device="cpu", max_sequence_length=tiny.TOKENS)
    places = torch.tensor([[0, row, column, 0] for row in range(x.shape[2]) for column in range(x.shape[3])])
    return transformer(
        klein_tokens(x).repeat(len(texts), 1, 1), states, torch.full((len(texts),), t / 1000),
        places.expand(len(texts), -1, -1), text_ids, None,
    ).sample  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "name", "tokens", "said"),
    [
        ("upstream_2026_flux", "flux-dev", flux_tokens, flux_said),
        ("upstream_2026_klein", "klein-base", klein_tokens, klein_said),
    ],
)
@pytest.mark.parametrize("erase_from", [None, "dog"])
def test_flux_points_lie_on_the_stock_pipelines_path_and_targets_start_from_what_it_drew(
    experiment: str, name: str, tokens: Callable[[Tensor], Tensor], said: Callable[..., Tensor], erase_from: str | None
) -> None:
    pipe, rolled = tiny.every(name), erase_from or "cat"
    base = copy.deepcopy(pipe.transformer)
    steps = [f"trajectory.num_steps={FLUX_STEPS}", "trajectory.size=16", f"seed={SEED}"]
    steps += [f"erase_from=[{erase_from}]"] if erase_from else []
    config = composed("train", [f"experiment={experiment}", "concepts=[cat]", *steps])
    assert isinstance(config, TrainConfig)
    config.check()
    family: Any = family_of(pipe)
    family.max_tokens = tiny.TOKENS
    plan = make_plan(config, None)
    views = WeightViews(family.denoiser, family.select(plan.selection).names)
    erasing, _ = learner.point_sources(family, plan, views.student, views.teacher, 1)
    met = set()
    for step in range(5):
        points = erasing.points(step, [0])
        t, path = float(points.t[0]), list[Tensor]()
        drawn = seeding.normal([seeding.generator(SEED, "noise", step, 0)], points.x.shape[1:])
        noise = tokens(drawn)

        def keep(_pipe: Any, _step: int, _time: Any, latents: dict[str, Tensor], path: list[Tensor] = path) -> Any:
            path.append(latents["latents"])
            return latents

        pipe(
            prompt=rolled, num_inference_steps=FLUX_STEPS, guidance_scale=FLUX_GUIDANCE, height=16, width=16,
            latents=noise if name == "flux-dev" else drawn,
            max_sequence_length=tiny.TOKENS, output_type="latent", callback_on_step_end=keep,
        )  # fmt: skip
        at = pipe.scheduler.timesteps.tolist().index(t)
        met.add(at)
        torch.testing.assert_close(tokens(points.x), [noise, *path][at], atol=1e-6, rtol=0)
        with torch.no_grad():
            start, cat, null = said(pipe, base, points.x, t, [rolled, "cat", ""]).split(1)
        ours = objectives.target(
            points.prediction(plan.objective.anchor), points.concept, points.prediction("null"), eta=plan.objective.eta
        )
        torch.testing.assert_close(tokens(ours), start - 1.0 * (cat - null), atol=1e-6, rtol=0)
    assert len(met) > 2
