"""From x_T to x_t: sampling trajectories, and the times at which their points train.

`rollout` samples as the stock pipeline does and keeps what it passed through: the latents, what the denoiser
got, the time it was told, and both of its predictions before guidance mixed them. `times` names the points
of a rollout that a training rule may draw, and the time label each of them gets; upstream's scripts disagree
on both.

Source: ESD section 4 and its algorithm; time rules from rohitgandikota/erasing (see `times`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor

from .errors import UserError
from .families.base import Conditioning, Denoiser, Family

TimeRule = Literal["visited", "index", "compvis", "alt"]
Edit = Callable[[Any, int, Tensor], Tensor]  # (solver, steps taken, x) -> x to go on with


@dataclass(frozen=True)
class Trajectory:
    """What a rollout passed through: s points of b samples each.

    Attributes:
        latents: x_t before input scaling (s, b, c, h, w).
        inputs: what the denoiser got, x_t after `Family.model_input` (s, b, c, h, w).
        t: scheduler times (s, b); 0 where a sample ran to its end.
        cond: the prompt's predictions (s, b, c, h, w), before guidance mixed them; None with keep="last".
        null: the null prompt's; None with keep="last" or without guidance.
        final: latents after the last step taken (b, c, h, w); clean latents unless stopped before.
    """

    latents: Tensor
    inputs: Tensor
    t: Tensor
    cond: Tensor | None
    null: Tensor | None
    final: Tensor


@torch.no_grad()
def rollout(
    family: Family,
    denoiser: Denoiser,
    x_T: Tensor,
    cond: Conditioning,
    null: Conditioning,
    *,
    num_steps: int,
    guidance_scale: float,
    stop: int | Sequence[int] | None = None,
    keep: Literal["all", "last"] = "all",
    scheduler: str | None = None,
    skip: int = 0,
    generators: list[torch.Generator] | None = None,
    max_batch: int | None = None,
    edit: Edit | None = None,
) -> Trajectory:
    """Samples from x_T under guidance as the stock pipeline does, and keeps what it passed through.

    Args:
        family: of the model.
        denoiser: live student (unwrapped) or teacher view.
        x_T: unit-variance noise (b, c, h, w).
        cond: the prompts, b rows.
        null: the negative prompt, one row or b.
        num_steps: sampling steps.
        guidance_scale: above 1, guided = null + scale (cond - null); at 1 or less there is no guidance, as in the
            stock pipelines, and only the prompts are evaluated. "distilled" families are told the scale and "none"
            families ignore it: one pass.
        stop: number of scheduler steps to take before stopping, for all or per sample; None for all of them.
            A stopped sample costs nothing more.
        keep: "all" points where the denoiser was evaluated, or the "last": the point each sample stopped at.
        scheduler: see `Family.scheduler`.
        skip: leading scheduler times to leave out.
        generators: one per sample, for schedulers that add noise; None draws that noise from torch's global
            generator.
        max_batch: most rows in one call of the denoiser; None for no limit.
        edit: called before each step, and once after the last, with the solver, the number of steps taken and the
            latents x (b, c, h, w) as the solver has them; returns the latents to go on with.

    Raises:
        ValueError: keep="all" with unequal stops, or a stop out of range.
    """
    solver = family.scheduler(num_steps, scheduler, x_T.shape[1:])
    times_left = solver.timesteps[skip:]
    stops = torch.as_tensor(len(times_left) if stop is None else stop).expand(len(x_T))
    low, high = int(stops.min()), int(stops.max())
    if low < 0 or high > len(times_left) or (keep == "all" and low != high):
        raise ValueError(f"stop is {stop}; allowed: 0 to {len(times_left)}, the same for all samples with keep='all'")
    conditionings = conditionings_of(family, cond, null, guidance_scale)
    takes_noise = generators is not None and "generator" in inspect.signature(solver.step).parameters
    visits = _walk(
        family, denoiser, solver, family.first_latents(solver, x_T), times_left, stops, conditionings,
        guidance_scale, {"generator": generators} if takes_noise else {}, max_batch, edit,
    )  # fmt: skip
    if keep == "last":
        x, x_in, t_last = x_T.clone(), x_T.clone(), torch.zeros(len(x_T), device=x_T.device)
        for visit in visits:
            here = (stops == visit.number).to(x.device)
            x[here], x_in[here], t_last[here] = visit.x[here], visit.x_in[here], visit.t.to(t_last)
        return Trajectory(x[None], x_in[None], t_last[None], None, None, x)
    *evaluated, last = visits

    def stack(get: Callable[[_Visit], Tensor]) -> Tensor:
        return torch.stack([get(v) for v in evaluated]) if evaluated else x_T.new_empty(0, *x_T.shape)

    return Trajectory(
        latents=stack(lambda v: v.x),
        inputs=stack(lambda v: v.x_in),
        t=stack(lambda v: v.t.expand(len(x_T))),
        cond=stack(lambda v: v.predictions[-1]),
        null=stack(lambda v: v.predictions[0]) if len(conditionings) == 2 else None,
        final=last.x,
    )


class _Visit(NamedTuple):
    """One point on the way: its number, latents, denoiser input, time, and the predictions made there."""

    number: int
    x: Tensor
    x_in: Tensor
    t: Tensor
    predictions: list[Tensor]


def _walk(
    family: Family,
    denoiser: Denoiser,
    solver: Any,
    x: Tensor,
    timesteps: Tensor,
    stops: Tensor,
    conditionings: Sequence[Conditioning],
    guidance_scale: float,
    noise: dict[str, Any],
    max_batch: int | None,
    edit: Edit | None,
) -> Iterator[_Visit]:
    """Every point up to the last stop; the final one carries no predictions.

    Rows that have stopped are no longer evaluated but take idle steps, because a multistep solver keeps one
    state for the whole batch.
    """
    for i, t in enumerate(timesteps):
        x = edit(solver, i, x) if edit else x
        x_in = family.model_input(solver, x, t)
        rows = torch.nonzero(stops > i).flatten().to(x.device)
        if not len(rows):
            yield _Visit(i, x, x_in, t, [])
            return
        parts = predict_many(family, denoiser, x_in[rows], t, [c[rows] for c in conditionings], max_batch)
        yield _Visit(i, x, x_in, t, parts)
        prediction = torch.zeros_like(x).index_copy(0, rows, mixed(parts, guidance_scale))
        x = solver.step(prediction, t, x, return_dict=False, **noise)[0]
    x = edit(solver, len(timesteps), x) if edit else x
    yield _Visit(len(timesteps), x, x, timesteps.new_zeros(()), [])


def conditionings_of(
    family: Family, cond: Conditioning, null: Conditioning, guidance_scale: float
) -> list[Conditioning]:
    """What the denoiser is asked for at each point: null prompt (one row or b) and prompts, or the prompts alone."""
    told = family.with_guidance(cond, guidance_scale)
    if family.guidance != "cfg" or guidance_scale <= 1:
        return [told]
    return [null[[0] * len(told)] if len(null) == 1 else null, told]


def mixed(predictions: Sequence[Tensor], guidance_scale: float) -> Tensor:
    """null + scale (cond - null) of the predictions for `conditionings_of`; the only one as it is."""
    null, cond = predictions[0], predictions[-1]
    return null + guidance_scale * (cond - null) if len(predictions) == 2 else cond


def clean(family: Family, x_in: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """x0_hat (b, c, h, w): the clean latents that a prediction makes of what the denoiser got at t (scalar or (b,))."""
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in family.alpha_sigma(t.expand(len(x_in))))
    match family.prediction_type:
        case "epsilon":
            return (x_in - sigma * prediction) / alpha
        case "v_prediction":
            return alpha * x_in - sigma * prediction
        case "flow":
            return x_in - sigma * prediction


def predict_many(
    family: Family,
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    conditionings: Sequence[Conditioning],
    max_batch: int | None = None,
    *,
    which: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """One prediction (b, c, h, w) for each conditioning at the same x (b, c, h, w) and t (scalar or (b,)).

    All go through the denoiser as one batch, cut into calls of at most `max_batch` rows.

    Args:
        which: for each conditioning, which of its rows goes with each x, int64 (b,): a row that serves many x is then
            there once, and not for all of them together. None where each has b rows, in order.
    """
    k, rows = len(conditionings), len(x) * len(conditionings)
    x_all, cond_all = torch.cat([x] * k), Conditioning.cat(conditionings)
    first = [0, *accumulate(map(len, conditionings))]
    picked = None if which is None else torch.cat([start + row for start, row in zip(first, which, strict=False)])
    t_all = t if t.ndim == 0 else t.repeat(k)
    size = max_batch or rows
    parts = [
        family.predict(denoiser, x_all[i : i + size], t_all if t.ndim == 0 else t_all[i : i + size], c)
        for i in range(0, rows, size)
        for c in [cond_all[slice(i, i + size) if picked is None else picked[i : i + size]]]
    ]
    return list(torch.cat(parts).chunk(k))


@dataclass(frozen=True)
class Times:
    """Equally likely training points of a rollout.

    Attributes:
        stops: scheduler steps taken before choice k is reached (K,).
        low: its time label is uniform in [low, low + width) (K,).
        width: 1 for no jitter (K,).
        skip: leading scheduler times that the rollout leaves out.
        visited: labels are the times at which the denoiser is evaluated, so its predictions there are the
            ones needed.
    """

    stops: tuple[int, ...]
    low: tuple[float, ...]
    width: tuple[int, ...]
    skip: int
    visited: bool


def times(rule: TimeRule, solver: Any) -> Times:
    """The training points a rule allows on a scheduler whose timesteps are set (n steps, T training times).

    visited  every point where the solver first evaluates a step; t is the scheduler's own time there. The
             default.
    index    the first n scheduler times, inner stages included, as upstream's 2025 scripts (esd_sd.py) draw
             them: with PNDM's n + 1 times the repeated one counts twice and the last never.
    compvis  bin m uniform in 0..n-1, t uniform in that bin of T/n times. Upstream drops the first DDIM step
             and stops after n - m (of n - 1) steps: x is two to three bins less noisy than its label t says
             (train-esd.py at a2189e9; `index + 1 == till` in ldm/models/diffusion/ddim.py).
    alt      k uniform in 1..n-2 steps, then t = T - 1 + offset - k T/n, 19 above x's own level at n = 50
             (alt_esd_diffusers.py relabels the point on a 1000-step schedule).

    Raises:
        UserError: unknown rule; compvis or alt without DDIM's "leading" times or with too few steps.
    """
    config: Any = solver.config
    n, total = int(solver.num_inference_steps), int(config.num_train_timesteps)
    if rule in ("visited", "index"):
        stops = first_stages(solver) if rule == "visited" else range(n)
        return Times(tuple(stops), tuple(solver.timesteps[list(stops)].tolist()), (1,) * len(stops), 0, True)
    if rule not in get_args(TimeRule):
        raise UserError(f"time_rule is {rule!r}; allowed: {', '.join(get_args(TimeRule))}")
    if not isinstance(solver, DDIMScheduler) or config.timestep_spacing != "leading" or n < 3:
        raise UserError(
            f"time_rule {rule!r} relabels DDIM's evenly spaced times; use scheduler=ddim with 'leading' "
            "spacing and at least 3 steps, or time_rule=visited"
        )
    if rule == "compvis":
        edges = [round(m / n * total) for m in range(n + 1)]
        widths = tuple(high - low for low, high in pairwise(edges))
        return Times(tuple(min(n - 1, n - m) for m in range(n)), tuple(map(float, edges[:-1])), widths, 1, False)
    stops = range(1, n - 1)
    top = total - 1 + int(config.steps_offset)
    return Times(tuple(stops), tuple(float(top - int(k / n * total)) for k in stops), (1,) * len(stops), 0, False)


def first_stages(solver: Any) -> list[int]:
    """Indices of `solver.timesteps` where a step begins, not one of its inner stages."""
    count = len(solver.timesteps)
    if isinstance(solver, PNDMScheduler):
        plms: Any = solver
        warm_up = 0 if plms.config.skip_prk_steps else len(plms.prk_timesteps)  # four evaluations a step
        inner = {i for i in range(warm_up) if i % 4} or {1}  # without it, the second time is taken twice
        return [i for i in range(count) if i not in inner]
    return list(range(0, count, getattr(solver, "order", 1)))  # Heun, KDPM2: two evaluations a step
