from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esd import seeding
from esd.errors import UserError
from esd.families import Family, family_of
from esd.trajectory import predict_many, rollout, times
from tests import tiny

PROMPTS = ["a cat", "the dog in mosaic style", "rose"]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def roll(family: Family, x: Tensor, prompts: list[str], **how: Any) -> Any:
    how = {"num_steps": 5, "guidance_scale": 3.0, **how}
    return rollout(family, family.denoiser, x, family.encode(prompts), family.encode([""]), **how)


def stock_latents(family: Family, scheduler: str, prompts: list[str], **call: Any) -> Tensor:
    """The final latents of the stock pipeline with that scheduler, of the size of those in `call` if there are any."""
    pipe, own = family.pipe, family.pipe.scheduler
    height, width = call["latents"].shape[2:] if "latents" in call else family.sample_shape[1:]
    size = {"height": height * 2, "width": width * 2}  # the tiny VAE halves
    try:
        pipe.scheduler = family.scheduler(5, scheduler)
        return pipe(prompts, num_inference_steps=5, output_type="latent", **size, **call).images
    finally:
        pipe.scheduler = own


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++", "pndm", "heun", "unipc", "lms"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_final_latents_are_the_stock_pipelines(any_family: Family, scheduler: str, guidance_scale: float) -> None:
    x = any_family.initial_noise(generators(1, 2, 3))
    expected = stock_latents(any_family, scheduler, PROMPTS, guidance_scale=guidance_scale, latents=x)
    path = roll(any_family, x, PROMPTS, scheduler=scheduler, guidance_scale=guidance_scale)
    torch.testing.assert_close(path.final, expected, atol=1e-4, rtol=1e-4)
    assert (path.null is None) == (guidance_scale == 1.0)


@pytest.mark.parametrize("scheduler", ["euler_a", "ddpm"])
def test_stochastic_samplers_draw_what_the_stock_pipeline_draws(tiny_family: Family, scheduler: str) -> None:
    expected = stock_latents(tiny_family, scheduler, PROMPTS, guidance_scale=3.0, generator=generators(1, 2, 3))
    noise = generators(1, 2, 3)
    path = roll(tiny_family, tiny_family.initial_noise(noise), PROMPTS, scheduler=scheduler, generators=noise)
    torch.testing.assert_close(path.final, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm", "heun"])
def test_an_edit_sees_every_step_and_what_it_returns_goes_on(tiny_family: Family, scheduler: str) -> None:
    x, seen = tiny_family.initial_noise(generators(1, 2)), list[int]()

    def note(solver: Any, taken: int, latents: Tensor) -> Tensor:
        seen.append(taken)
        return latents

    path = roll(tiny_family, x, PROMPTS[:2], scheduler=scheduler, edit=note)
    assert seen == list(range(len(path.latents) + 1))
    assert torch.equal(path.final, roll(tiny_family, x, PROMPTS[:2], scheduler=scheduler).final)
    other = tiny_family.initial_noise(generators(3, 4))

    def swap(solver: Any, taken: int, latents: Tensor) -> Tensor:
        return tiny_family.first_latents(solver, other) if taken == 0 else latents

    swapped = roll(tiny_family, x, PROMPTS[:2], scheduler=scheduler, edit=swap)
    assert torch.equal(swapped.final, roll(tiny_family, other, PROMPTS[:2], scheduler=scheduler).final)


def test_latents_need_not_be_square(tiny_family: Family) -> None:
    x = seeding.normal(generators(1, 2), (4, 8, 16))
    expected = stock_latents(tiny_family, "euler", PROMPTS[:2], guidance_scale=3.0, latents=x)
    path = roll(tiny_family, x, PROMPTS[:2], scheduler="euler")
    assert path.final.shape == x.shape
    torch.testing.assert_close(path.final, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm", "heun"])
def test_every_point_holds_what_the_denoiser_got_and_said(any_family: Family, scheduler: str) -> None:
    family = any_family
    path = roll(family, family.initial_noise(generators(1, 2)), PROMPTS[:2], scheduler=scheduler)
    solver = family.scheduler(5, scheduler)
    n = len(solver.timesteps)
    assert path.inputs.shape == path.latents.shape == path.cond.shape == path.null.shape == (n, 2, *family.sample_shape)
    assert torch.equal(path.t, solver.timesteps[:, None].expand(n, 2).to(path.t))
    for i in range(n):
        scaled = family.model_input(solver, path.latents[i], solver.timesteps[i])
        torch.testing.assert_close(path.inputs[i], scaled)
        for conditioning, said in (
            (family.encode(PROMPTS[:2]), path.cond),
            (family.encode(["", ""]), path.null),
        ):
            with torch.no_grad():
                direct = family.predict(family.denoiser, path.inputs[i], path.t[i], conditioning)
            torch.testing.assert_close(said[i], direct, atol=1e-5, rtol=1e-4)
        guided = path.null[i] + 3.0 * (path.cond[i] - path.null[i])
        after = solver.step(guided, solver.timesteps[i], path.latents[i], return_dict=False)[0]
        torch.testing.assert_close(after, path.latents[i + 1] if i + 1 < n else path.final, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm", "dpm++"])
def test_each_sample_stops_at_its_own_step(any_family: Family, scheduler: str) -> None:
    x = any_family.initial_noise(generators(1, 2, 3))
    whole = roll(any_family, x, PROMPTS, scheduler=scheduler)
    n = len(whole.t)
    stopped = roll(any_family, x, PROMPTS, scheduler=scheduler, stop=[0, n, 3], keep="last")
    expected = [whole.latents[0, 0], whole.final[1], whole.latents[3, 2]]
    torch.testing.assert_close(stopped.final, torch.stack(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stopped.inputs[0, 2], whole.inputs[3, 2], atol=1e-4, rtol=1e-4)
    assert stopped.t[0].tolist() == [whole.t[0, 0], 0, whole.t[3, 2]]
    assert stopped.cond is None


def test_stopped_samples_are_no_longer_evaluated(tiny_family: Family) -> None:
    rows: list[int] = []

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        return tiny_family.denoiser(x, *args, **kwargs)

    x = tiny_family.initial_noise(generators(1, 2, 3))
    rollout(
        tiny_family, counting, x, tiny_family.encode(PROMPTS), tiny_family.encode([""]),
        num_steps=5, guidance_scale=3.0, stop=[0, 2, 3], keep="last", scheduler="ddim",
    )  # fmt: skip
    assert rows == [4, 4, 2]


def test_a_partial_rollout_is_the_start_of_the_whole(tiny_family: Family) -> None:
    x = tiny_family.initial_noise(generators(4, 5))
    whole = roll(tiny_family, x, PROMPTS[:2], scheduler="euler")
    part = roll(tiny_family, x, PROMPTS[:2], scheduler="euler", stop=2)
    assert torch.equal(part.inputs, whole.inputs[:2])
    assert torch.equal(part.final, whole.latents[2])
    none = roll(tiny_family, x, PROMPTS[:2], scheduler="euler", stop=0)
    assert len(none.inputs) == 0
    assert torch.equal(none.final, whole.latents[0])


def test_a_sample_does_not_depend_on_its_batch_nor_on_the_cut_of_calls(any_family: Family) -> None:
    x = any_family.initial_noise(generators(1, 2, 3))
    whole = roll(any_family, x, PROMPTS, scheduler="dpm++")
    alone = roll(any_family, x[1:2], PROMPTS[1:2], scheduler="dpm++")
    torch.testing.assert_close(alone.final[0], whole.final[1], atol=1e-4, rtol=1e-4)
    cut = roll(any_family, x, PROMPTS, scheduler="dpm++", max_batch=4)
    torch.testing.assert_close(cut.final, whole.final, atol=1e-4, rtol=1e-4)


def test_a_rollout_records_no_gradient(tiny_family: Family) -> None:
    path = roll(tiny_family, tiny_family.initial_noise(generators(1)), PROMPTS[:1])
    assert not path.final.requires_grad
    assert not path.cond.requires_grad


@pytest.mark.parametrize("how", [{"stop": [1, 2]}, {"stop": 9}, {"stop": -1}])
def test_impossible_stops_are_refused(tiny_family: Family, how: dict) -> None:
    with pytest.raises(ValueError, match="stop"):
        roll(tiny_family, tiny_family.initial_noise(generators(1, 2)), PROMPTS[:2], scheduler="ddim", **how)


def test_predictions_for_many_conditionings_are_those_for_each(any_family: Family) -> None:
    x, t = any_family.initial_noise(generators(1, 2, 3)), torch.tensor([1.0, 400.0, 999.0])
    conditionings = [any_family.encode(PROMPTS), any_family.encode(["", "", ""])]
    with torch.no_grad():
        for size in (None, 1, 4):
            together = predict_many(any_family, any_family.denoiser, x, t, conditionings, size)
            for got, cond in zip(together, conditionings, strict=True):
                alone = any_family.predict(any_family.denoiser, x, t, cond)
                torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-4)


def test_visited_times_are_those_where_a_step_begins(tiny_family: Family) -> None:
    ddim, pndm, heun = (tiny_family.scheduler(50, name) for name in ("ddim", "pndm", "heun"))
    assert times("visited", ddim).low == tuple(float(t) for t in range(981, 0, -20))
    assert times("visited", pndm).stops == (0, *range(2, 51))  # PNDM evaluates its second time twice
    assert times("visited", pndm).low == times("visited", ddim).low
    assert times("visited", heun).stops == tuple(range(0, 99, 2))  # every other evaluation is an inner stage
    assert len(set(times("visited", heun).low)) == 50


def test_visited_times_skip_the_warm_up_stages_of_runge_kutta() -> None:
    pipe = tiny.pipeline()
    pipe.scheduler.register_to_config(skip_prk_steps=False)
    solver = family_of(pipe).scheduler(10)
    stops = times("visited", solver).stops
    assert stops[:4] == (0, 4, 8, 12)
    assert len({float(solver.timesteps[i]) for i in stops}) == len(stops)


def test_index_rule_is_the_2025_scripts(tiny_family: Family) -> None:
    """They draw `random.randint(0, n - 1)` and take `scheduler.timesteps` there, PNDM's repeat included."""
    solver = tiny_family.scheduler(50, "pndm")
    rule = times("index", solver)
    assert rule.stops == tuple(range(50))
    assert list(rule.low) == solver.timesteps[:50].tolist()
    assert rule.low[1] == rule.low[2]


@pytest.mark.parametrize("n", [50, 30, 20])
def test_compvis_rule_is_upstreams_loop(tiny_family: Family, n: int) -> None:
    """Walks the sampler's loop (ldm/models/diffusion/ddim.py at a2189e9) for every `till_T`."""
    solver = tiny_family.scheduler(n, "ddim")
    rule = times("compvis", solver)
    assert rule.skip == 1
    times_up = sorted(solver.timesteps.tolist())[:-1]  # the sampler drops the noisiest
    for till in range(n):
        done = 0
        for i, _ in enumerate(reversed(times_up)):
            done += 1
            if len(times_up) - i - 1 + 1 == till:
                break
        assert rule.stops[till] == done
        edges = round(till / n * 1000), round((till + 1) / n * 1000)
        assert (rule.low[till], rule.low[till] + rule.width[till]) == edges
        if till >= 2 and n == 50:
            level = times_up[::-1][done]  # where x is now
            assert level == 20 * (till - 2) + 1


def test_alt_rule_relabels_x_nineteen_above_its_level(tiny_family: Family) -> None:
    solver = tiny_family.scheduler(50, "ddim")
    rule = times("alt", solver)
    assert rule.stops == tuple(range(1, 49))
    assert rule.low == tuple(float(1000 - 20 * k) for k in range(1, 49))
    assert {label - float(solver.timesteps[k]) for k, label in zip(rule.stops, rule.low, strict=True)} == {19.0}


def test_rules_that_relabel_need_ddim(tiny_family: Family) -> None:
    for rule in ("compvis", "alt"):
        with pytest.raises(UserError, match="ddim"):
            times(rule, tiny_family.scheduler(50, "euler"))
        with pytest.raises(UserError, match="3 steps"):
            times(rule, tiny_family.scheduler(2, "ddim"))
    with pytest.raises(UserError, match="'uniform'"):
        times("uniform", tiny_family.scheduler(50, "ddim"))  # type: ignore[arg-type]
