"""Figures of the schedule, of samplers, of what is drawn on the way and of what steers it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from esd.analysis import figures
from esd.analysis.edits import picked
from esd.evaluation.pixels import images_of
from esd.trajectory import first_stages

from . import drawing, solvers
from .drawing import seeded
from .walker import COLUMNS, Walk, share_seen

SOLVED = 2  # most pictures that samplers are compared on
NAMES = {"dpm++": "DPM++", "heun": "Heun", "euler": "Euler"}  # of references


def show_schedule(walk: Walk) -> None:
    """The noise schedule, and the times that the sampler visits."""
    found = solvers.schedule(walk.family, walk.subject.num_steps)
    alpha, sigma = found.at(found.visited)
    walk.results.table("schedule", [
        {"number": i, "t": t, "alpha": a, "sigma": s, "noise_over_signal": s / a if a else None}
        for i, (t, a, s) in enumerate(zip(found.visited, alpha, sigma, strict=True))
    ])  # fmt: skip
    figure, (shares, ratio) = figures.panels(1, 2, title="Noise schedule x_t = α x_0 + σ ε, and the times visited")
    with figures.style():
        shares.plot(found.t, found.alpha, label="signal α", color=figures.COLOURS[0])
        shares.plot(found.t, found.sigma, "--", label="noise σ", color=figures.COLOURS[1])
        shares.plot(found.visited, sigma, "o", color=figures.COLOURS[1], markersize=5)
        shares.set(xlabel="time t", ylabel="share of x_t", title="signal and noise")
        shares.legend()
        known = (found.alpha > 1e-3) & (found.sigma > 1e-3)
        ratio.plot(found.t[known], found.sigma[known] / found.alpha[known], color=figures.COLOURS[2])
        shown = (alpha > 1e-3) & (sigma > 1e-3)
        ratio.plot(found.visited[shown], sigma[shown] / alpha[shown], "o", color=figures.COLOURS[2], markersize=5)
        ratio.set(yscale="log", xlabel="time t", ylabel="σ / α", title="noise over signal, the sigma of Euler's kind")
    half = float(np.interp(0.0, np.log(found.sigma[known] / found.alpha[known]), found.t[known]))
    first, last = found.visited[0], found.visited[-1]
    walk.results.figure("schedule", figure, (
        f"{walk.subject.num_steps} steps visit t = {first:.0f} to {last:.0f} (dots). At the first σ is {sigma[0]:.3f}, "
        f"at the last {sigma[-1]:.3f}. Noise and signal are equal at t = {half:.0f}; "
        f"{np.mean(found.visited > half):.0%} of the times lie above."
    ))  # fmt: skip


def show_samplers(walk: Walk, samplers: Sequence[str], steps: Sequence[int]) -> None:
    """How fast samplers come near the solution."""
    family, results = walk.family, walk.results
    flow = family.prediction_type == "flow"
    if flow:
        samplers = solvers.FLOWS
        results.note(
            f"Left out: samplers other than Euler's, for {family.name}, a flow, is sampled with that one here."
        )
    seeds = walk.seeds[:SOLVED]
    cond, noise = walk.told(walk.prompt)[range(len(seeds))], family.initial_noise(seeded(seeds))
    solved = partial(solvers.solve, family, noise, cond, guidance_scale=walk.subject.guidance_scale)

    (best, fine), (beside, coarser) = solvers.references(flow)

    def reference() -> np.ndarray:
        return solved(sampler=best, num_steps=fine)[0].cpu().numpy()

    def off() -> np.ndarray:
        return solvers.errors(solved(sampler=beside, num_steps=coarser)[0].cpu(), exact).numpy()

    def found(sampler: str, exact: torch.Tensor) -> np.ndarray:
        rows = []
        for count in steps:
            end, calls = solved(sampler=sampler, num_steps=count)
            rows.append([count, calls, *solvers.errors(end.cpu(), exact).tolist()])
        return np.array(rows)

    exact = torch.from_numpy(results.kept("reference", reference))
    own = results.kept("reference-error", off)
    curves = {name: results.kept(f"errors-{name.replace('+', 'p')}", partial(found, name, exact)) for name in samplers}
    results.table("samplers", [
        {"sampler": name, "steps": int(row[0]), "calls": int(row[1]), "picture": i, "error": error}
        for name, curve in curves.items()
        for row in curve
        for i, error in enumerate(row[2:])
    ])  # fmt: skip
    results.table("reference", [
        {"sampler": best, "steps": fine, "beside": beside, "beside_steps": coarser, "picture": i, "apart": apart}
        for i, apart in enumerate(own)
    ])  # fmt: skip
    figure, (ax,) = figures.panels(
        title=f"Samplers as solvers: error against {NAMES[best]} in {fine} steps", height=4.6
    )
    told, scale = [], float(exact.std())
    with figures.style():
        for number, (name, curve) in enumerate(curves.items()):
            dashes = ("-", "--", "-.", ":")[number % 4]
            mean = curve[:, 2:].mean(1)
            ax.plot(curve[:, 1], mean, dashes, marker="o", color=figures.COLOURS[number], label=name)
            told.append(f"{name} {falling(curve[:, 1], mean)}")
        label = f"{NAMES[beside]} in {coarser} steps"
        ax.axhline(own.mean(), color=figures.GREY, linestyle=":", linewidth=1.4, label=label)
        ax.set(xscale="log", yscale="log", xlabel="calls of the denoiser", ylabel="error of x_0 (root mean square)")
        for axis in (ax.xaxis, ax.yaxis):
            figures.plain_numbers(axis)
        ax.legend()
    least = min(float(curve[:, 2:].mean(1).min()) for curve in curves.values())
    results.figure("samplers", figure, (
        f"Mean error over {len(seeds)} pictures, against {NAMES[best]} in {fine} steps, of latents whose own deviation "
        f"is {scale:.2g}: {'; '.join(told)}. From that reference {NAMES[beside]} in {coarser} steps lies "
        f"{own.mean():.2g} away (dotted), the least error shown is {least:.2g}."
    ))  # fmt: skip


def falling(calls: np.ndarray, found: np.ndarray) -> str:
    """How an error (n,) falls with the calls (n,) of the denoiser; from one number of calls nothing follows."""
    ends = dict.fromkeys(f"{error:.2g} with {count:.0f} calls" for count, error in zip(calls, found, strict=True))
    text, power = ", ".join(list(ends)[:: max(1, len(ends) - 1)]), solvers.order(calls.tolist(), found.tolist())
    return text if power is None else f"{text}, falling as calls^{-power:.1f}"


def show_strips(walk: Walk) -> None:
    """x_t and x0_hat along the way."""
    subject, results = walk.subject, walk.results

    def measured() -> np.ndarray:
        t, x, clean = drawing.strips(subject, walk.told(walk.prompt)[[0]], walk.seeds[:1])
        drawn = [images_of(walk.family, part[:, 0]) for part in (x, clean)]
        away = solvers.errors(clean[:, 0], clean[-1])
        results.kept("strip-distances", lambda: np.stack([t.cpu().numpy(), away.cpu().numpy()]))
        return np.stack(drawn)

    images = results.kept("strips", measured)
    t, away = results.kept("strip-distances", lambda: np.zeros(0))
    results.table("strips", [{"step": i, "t": a, "x0_error": b} for i, (a, b) in enumerate(zip(t, away, strict=True))])
    chosen = picked(range(len(t)), COLUMNS)
    figure = figures.pictures(
        images[:, chosen], title=f"{walk.prompt}: on the way, and what each prediction makes of it",
        rows=["x_t", "x0_hat"], columns=[f"t = {t[i]:.0f}" for i in chosen], column_name="time",
    )  # fmt: skip
    half, near = (int(np.argmax(away <= away[0] / part)) for part in (2, 10))
    results.figure("strips", figure, (
        f"The distance of x0_hat from the last one is halved at t = {t[half]:.0f}, after {half} of {len(t)} steps, "
        f"and below a tenth from t = {t[near]:.0f} on, after {near}."
    ))  # fmt: skip


def show_img2img(walk: Walk, starts: Sequence[float]) -> None:
    """Pictures of the prompt that go on under another, from ever later steps."""
    subject, family = walk.subject, walk.family
    cond, seeds = walk.told(walk.other), walk.seeds
    plain = walk.pictures("plain", lambda: drawing.walk(subject, walk.told(walk.prompt), seeds).final)
    aim = walk.pictures("other", lambda: drawing.walk(subject, cond, seeds).final)
    count = len(first_stages(family.scheduler(subject.num_steps)))
    steps = list(dict.fromkeys(min(int(share * count), count - 1) for share in starts))

    def gone_on(start: int) -> torch.Tensor:
        pixels = torch.from_numpy(plain).permute(0, 3, 1, 2).float() / 255
        return drawing.img2img(subject, family.encode_images(pixels), cond, [seed + 1 for seed in seeds], start)

    images = [walk.pictures(f"img2img-{start}", partial(gone_on, start)) for start in steps]
    rows = [
        {"start": start, "steps": count, "from_picture": subject.distance(plain, drawn).mean(),
         "from_other": subject.distance(aim, drawn).mean()}
        | {f"prompt_{k}": v for k, v in walk.reading(drawn, walk.prompt).items()}
        | {f"other_{k}": v for k, v in walk.reading(drawn, walk.other).items()}
        for start, drawn in zip(steps, images, strict=True)
    ]  # fmt: skip
    walk.results.table("img2img", rows)
    figure = figures.pictures(
        np.stack([plain, *images], axis=1), title=f"A picture of {walk.prompt}, going on as {walk.other}",
        rows=walk.rows(), columns=["the picture", *(f"step {start}" for start in steps)],
        column_name=f"noised to the level of this step of {count}, and on from there",
    )  # fmt: skip
    distances = {name: np.array([row[name] for row in rows]) for name in ("from_picture", "from_other")}
    nearer = next((row["start"] for row in rows if row["from_picture"] < row["from_other"]), None)
    told = f"from step {nearer} on" if nearer is not None else "from no step on"
    walk.results.figure("img2img", figure, (
        f"{subject.distance_name}: from {distances['from_picture'][0]:.3g} at step {steps[0]} to "
        f"{distances['from_picture'][-1]:.3g} at step {steps[-1]} between result and first picture; results are nearer "
        f"to that than to what the other prompt draws by itself {told}."
        + share_seen(rows, "step {start}", "the other prompt's thing, and the first's", "other_thing", "prompt_thing")
    ))  # fmt: skip


def show_mixtures(walk: Walk, shares: Sequence[float]) -> None:
    """Pictures of mixtures of two prompts."""
    one, other = walk.told(walk.prompt), walk.told(walk.other)

    def drawn(share: float) -> torch.Tensor:
        return drawing.walk(walk.subject, drawing.between(one, other, share), walk.seeds).final

    images = [walk.pictures(f"mixture-{i}", partial(drawn, share)) for i, share in enumerate(shares)]
    rows = [
        {"share": share}
        | {f"prompt_{k}": v for k, v in walk.reading(found, walk.prompt).items()}
        | {f"other_{k}": v for k, v in walk.reading(found, walk.other).items()}
        | {"from_first": walk.subject.distance(images[0], found).mean(),
           "from_last": walk.subject.distance(images[-1], found).mean()}
        for share, found in zip(shares, images, strict=True)
    ]  # fmt: skip
    walk.results.table("mixtures", rows)
    figure = walk.across(
        shares, images, title=f"Between {walk.other} (0) and {walk.prompt} (1)",
        name="λ of the prompts' mixture λ e1 + (1 - λ) e2",
    )  # fmt: skip
    turns = next((row["share"] for row in rows if row["from_last"] < row["from_first"]), None)
    walk.results.figure("mixtures", figure, (
        f"Pictures are nearer to those of λ = {shares[-1]:g} "
        + (f"from λ = {turns:g} on." if turns is not None else "nowhere.")
        + share_seen(rows, "λ = {share:g}", "the first prompt's thing, and the other's", "prompt_thing", "other_thing")
    ))  # fmt: skip


def show_guidance(walk: Walk, scales: Sequence[float]) -> None:
    """Pictures over guidance scales."""
    family, subject = walk.family, walk.subject
    if family.guidance == "none":
        walk.results.note(f"Left out: a sweep of guidance scales, for {family.name} here takes no guidance.")
        return
    told = family.guidance == "cfg"  # else a scale of 0 is one more scale that the model is told

    def drawn(scale: float) -> torch.Tensor:
        cond = family.null()[[0] * len(walk.seeds)] if told and scale == 0 else walk.told(walk.prompt)
        return drawing.walk(subject, cond, walk.seeds, guidance_scale=scale).final

    known = [scale for scale in scales if not told or scale == 0 or scale >= 1]
    if len(known) < len(scales):
        walk.results.note("Left out: guidance scales between 0 and 1, which the stock pipelines do not have.")
    images = [walk.pictures(f"guidance-{i}", partial(drawn, scale)) for i, scale in enumerate(known)]
    rows = [
        {"scale": scale} | walk.reading(found, walk.prompt) | {"contrast": float(found.std() / 255)}
        for scale, found in zip(known, images, strict=True)
    ]  # fmt: skip
    walk.results.table("guidance", rows)
    figure = walk.across(
        known, images, title=f"{walk.prompt}: guidance u + s (c - u)",
        name="scale s" + " (0 is the null prompt)" * told,
    )  # fmt: skip
    walk.results.figure("guidance", figure, (
        f"Pixels deviate by {rows[0]['contrast']:.2f} at s = {known[0]:g} and by {rows[-1]['contrast']:.2f} at "
        f"s = {known[-1]:g}." + share_seen(rows, "s = {scale:g}", "the prompt's thing, and its style", "thing", "style")
    ))  # fmt: skip


def show_blue(walk: Walk, scales: Sequence[float]) -> None:
    """Pictures that follow the gradient of a loss: more blue."""
    prompts = [walk.prompt] * len(walk.seeds)

    def drawn(scale: float) -> np.ndarray:
        return drawing.guided_by(walk.subject, prompts, walk.seeds, drawing.blueness, scale)

    images = [walk.results.kept(f"blue-{i}", partial(drawn, scale)) for i, scale in enumerate(scales)]
    rows: list[dict[str, Any]] = [
        {"scale": scale, "blue": found[..., 2].mean() / 255, "red": found[..., 0].mean() / 255,
         "loss": np.abs(found[..., 2] / 255 - 0.9).mean()} | walk.reading(found, walk.prompt)
        for scale, found in zip(scales, images, strict=True)
    ]  # fmt: skip
    walk.results.table("blue", rows)
    figure = walk.across(
        scales, images, title=f"{walk.prompt}: guided by a loss, mean |blue - 0.9|",
        name="scale of the loss's gradient",
    )  # fmt: skip
    least, most = rows[0], rows[-1]
    walk.results.figure("blue", figure, (
        f"The loss goes from {least['loss']:.3f} at scale {scales[0]:g} to {most['loss']:.3f} at {scales[-1]:g}, blue "
        f"from {least['blue']:.2f} to {most['blue']:.2f}, red from {least['red']:.2f} to {most['red']:.2f}."
        + share_seen(rows, "{scale:g}", "the prompt's thing, by scale", "thing")
    ))  # fmt: skip
