"""How large representations are, channel by channel, and how far noise moves them, place by place and over time.

The pictures are the base's; with a checkpoint the erased model is shown the same ones. What is asked of each position:
is it as large while a picture is drawn as when the finished one is shown, are its channels of comparable size, where
does it depend on the noise, and what in other pictures is like a place in this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from esd.analysis import figures
from esd.analysis.results import Results
from esd.analysis.subject import Subject

from .extract import (
    Representations,
    channel_levels,
    check_time,
    concat,
    generate,
    img2repr,
    similarity,
    site_of,
    spread,
)

SPREAD_MAP = "hot"
TIME = "time t (1000 is noise)"


def analyse(
    subject: Subject,
    results: Results,
    *,
    prompts: Sequence[str],
    positions: Sequence[str],
    noises: int,
    channel_steps: Sequence[int],
    histogram_step: int,
    map_step: int,
    spread_steps: Sequence[int],
) -> None:
    """Leaves six figures and their tables, of base and erased.

    Args:
        subject: the model.
        results: gets tables and figures.
        prompts: one picture each, each with its own seed.
        positions: see `extract`.
        noises: that spread is taken over.
        channel_steps: training times of the channels' sizes.
        histogram_step: training time of the histogram.
        map_step: training time of maps of spread and of similarity.
        spread_steps: training times of the mean spread.

    Raises:
        UserError: no such position, or a time that there is not.
    """
    for position in positions:
        site_of(subject.family, position)
    for step in (*channel_steps, histogram_step, map_step, *spread_steps):
        check_time(subject.family, step)
    seeds = subject.seeds(len(prompts))
    images = results.kept("pictures", lambda: subject.draw(prompts, seeds))
    study = _Study(subject, results, list(positions), images)
    levels = study.measured(lambda version: _levels(study, version, prompts, seeds))
    _show_levels(study, levels)
    times = sorted({*channel_steps, histogram_step})
    channels = study.measured(lambda version: _channels(study, version, times))
    _show_channels(study, channels, times, channel_steps, histogram_step)
    maps = study.measured(lambda version: _maps(study, version, map_step, noises))
    _show_maps(study, maps, map_step, noises)
    over_time = study.measured(lambda version: _over_time(study, version, spread_steps, noises))
    _show_over_time(study, over_time, spread_steps, noises)
    _show_similarity(study, study.measured(lambda version: [_similar(study, version, map_step)]), map_step)


Measured = Mapping[str, Sequence[np.ndarray]]  # version to an array for each position


@dataclass(frozen=True)
class _Study:
    """What is looked into, where results go, and what is shown to the model."""

    subject: Subject
    results: Results
    positions: list[str]
    images: np.ndarray

    def measured(self, measure: Any) -> Measured:
        """What `measure` finds, of each version of the model."""
        found = {}
        for version in self.subject.versions:
            with self.subject.wearing(version):
                found[version] = measure(version)
        return found

    def shown(self, i: int, step: float, seeds: Sequence[int]) -> Representations:
        """Of picture i."""
        family, batch = self.subject.family, self.subject.batch_size
        return img2repr(family, self.images[i], self.positions, step, seeds=seeds, batch_size=batch)

    def kept(self, version: str, name: str, make: Callable[[int], np.ndarray]) -> list[np.ndarray]:
        """What `make` finds for each number of a position."""
        return [
            self.results.kept(f"{version}-{name}-{number}", partial(make, number))
            for number in range(len(self.positions))
        ]

    def named(self, version: str, name: str) -> str:
        """A curve's name: without the version where there is only the base."""
        return name if len(self.subject.versions) == 1 else f"{name}, {version}"

    def each(self, measured: Measured) -> Iterator[tuple[str, int, str, np.ndarray]]:
        """(version, number of the position, position, array)."""
        for version, arrays in measured.items():
            for number, (position, array) in enumerate(zip(self.positions, arrays, strict=True)):
                yield version, number, position, array


def _levels(study: _Study, version: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
    """For each position (3, prompts, steps): t, and mean |value| while drawing and of the finished picture."""
    subject = study.subject

    @cache
    def both() -> np.ndarray:
        rows = []
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            drawn = generate(
                subject.family, prompt, extract_positions=study.positions, seed=seed, num_steps=subject.num_steps,
                guidance_scale=subject.guidance_scale,
            )  # fmt: skip
            shown = [study.shown(i, float(t), [seed]) for t in drawn.t]
            rows.append([
                [
                    drawn.t.numpy(),
                    drawn.representations[position].abs().mean(dim=(1, 2, 3)).numpy(),
                    [float(now[position].abs().mean()) for now in shown],
                ]
                for position in study.positions
            ])  # fmt: skip
        return np.array(rows, float).transpose(1, 2, 0, 3)  # (positions, 3, prompts, steps)

    return study.kept(version, "levels", lambda number: both()[number])


def _show_levels(study: _Study, levels: Measured) -> None:
    results, told = study.results, []
    figure, axes = figures.panels(
        1, len(study.positions), title="Size of representations while drawing, and of the finished picture"
    )
    for number, position in enumerate(study.positions):
        curves, band = {}, {}
        for version, arrays in levels.items():
            t, drawn, shown = arrays[number]
            for name, found in (("while drawing", drawn), ("shown the picture", shown)):
                label = study.named(version, name)
                curves[label], band[label] = found.mean(0), (found.min(0), found.max(0))
            apart = shown.mean(0) / drawn.mean(0) - 1
            worst = int(np.abs(apart).argmax())
            told.append(
                f"{study.named(version, position)}: at the last step (t = {t[0, -1]:.0f}) mean |value| is "
                f"{drawn[:, -1].mean():.3g} while drawing and {shown[:, -1].mean():.3g} when the finished picture is "
                f"shown; they are furthest apart at t = {t[0, worst]:.0f}, where the second is {apart[worst]:+.0%}."
            )
        figures.lines(axes[number], t[0], curves, x_name=TIME, y_name="mean |value|", title=position, spread=band)
    results.table("levels", [
        {"model": version, "position": position, "picture": i, "t": t, "drawing": drawn, "shown": shown}
        for version, _, position, array in study.each(levels)
        for i in range(array.shape[1])
        for t, drawn, shown in array[:, i].T
    ])  # fmt: skip
    results.figure("levels", figure, (
        "Mean over the pictures, bands from least to most; the denoiser reads the prompt while drawing, the empty one "
        f"when it is shown the picture. {' '.join(told)}"
    ))  # fmt: skip


def _channels(study: _Study, version: str, steps: Sequence[int]) -> list[np.ndarray]:
    """For each position (steps, c): mean |value| of each channel, largest first, mean over the pictures."""

    @cache
    def shown(step: int) -> list[Representations]:
        return [study.shown(i, step, [study.subject.seed + i]) for i in range(len(study.images))]

    def sizes(number: int) -> np.ndarray:
        position = study.positions[number]
        return np.stack([
            np.mean([channel_levels(one[position]).numpy() for one in shown(step)], axis=0) for step in steps
        ])  # fmt: skip

    return study.kept(version, "channels", sizes)


def _show_channels(
    study: _Study, channels: Measured, times: Sequence[int], steps: Sequence[int], histogram_step: int
) -> None:
    results, positions = study.results, study.positions
    chosen = [times.index(step) for step in steps]
    results.table("channels", [
        {"model": version, "position": position, "t": t, "rank": rank, "mean_abs": value}
        for version, _, position, array in study.each(channels)
        for t, row in zip(times, array, strict=True)
        for rank, value in enumerate(row)
    ])  # fmt: skip
    versions = list(channels)
    sorted_figure, axes = figures.panels(
        len(versions), len(positions), title="Size of each channel, the largest first, from little noise to much"
    )
    told = []
    norm, colours = Normalize(min(steps), max(max(steps), min(steps) + 1)), matplotlib.colormaps[figures.MAP]
    for version, number, position, array in study.each(channels):
        ax = axes[versions.index(version) * len(positions) + number]
        with figures.style():
            for row in chosen:
                ax.plot(array[row], color=colours(norm(times[row])), linewidth=1.4)
            ax.set(yscale="log", xlabel="channel, by size", ylabel="mean |value|", title=study.named(version, position))
            figures.plain_numbers(ax.yaxis)
        mean = array[chosen].mean(1)
        told.append(
            f"{study.named(version, position)}: the mean over channels goes from {mean[0]:.3g} at t = {steps[0]} to "
            f"{mean[-1]:.3g} at t = {steps[-1]}; the largest channel is {array[chosen[0], 0] / mean[0]:.1f} times the "
            f"mean at t = {steps[0]} and {array[chosen[-1], 0] / mean[-1]:.1f} times at t = {steps[-1]}."
        )
    sorted_figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="t")
    results.figure("channels", sorted_figure, " ".join(told))
    _show_histogram(study, {v: [a[times.index(histogram_step)] for a in found] for v, found in channels.items()},
                    histogram_step)  # fmt: skip


def _show_histogram(study: _Study, channels: Measured, step: int) -> None:
    figure, axes = figures.panels(1, len(study.positions), title=f"Are channels of comparable size? At t = {step}")
    told = []
    for number, position in enumerate(study.positions):
        every = np.concatenate([arrays[number] for arrays in channels.values()])
        every = every[every > 0]
        bins = np.geomspace(every.min(), every.max() * (1 + 1e-6), 50)
        for color, (version, arrays) in zip(figures.COLOURS, channels.items(), strict=False):
            sizes = arrays[number]
            with figures.style():
                name = study.named(version, position)
                axes[number].hist(sizes, bins=bins.tolist(), color=color, alpha=0.6, label=version)
            close = np.mean((sizes > np.median(sizes) / 2) & (sizes < np.median(sizes) * 2))
            told.append(
                f"{name}: {close:.0%} of {len(sizes)} channels lie within a factor of 2 of the median "
                f"{np.median(sizes):.3g}; the largest, {sizes.max():.3g}, is {sizes.max() / np.median(sizes):.1f} "
                f"times that, and the largest tenth carries {_tenth(sizes):.0%} of the sum."
            )
        with figures.style():
            axes[number].set(xscale="log", xlabel="mean |value|", ylabel="channels", title=position)
            figures.plain_numbers(axes[number].xaxis)
            if len(channels) > 1:
                axes[number].legend()
    study.results.figure("histogram", figure, " ".join(told))


def _tenth(sizes: np.ndarray) -> float:
    """Share of the sum that the largest tenth has."""
    ordered = np.sort(sizes)[::-1]
    return float(ordered[: max(1, len(ordered) // 10)].sum() / ordered.sum())


def _maps(study: _Study, version: str, step: int, noises: int) -> list[np.ndarray]:
    """For each position (pictures, h, w): spread at each place."""

    @cache
    def shown(i: int) -> Representations:
        return study.shown(i, step, range(noises))

    def spreads(number: int) -> np.ndarray:
        position = study.positions[number]
        return np.stack([spread(shown(i)[position]).numpy() for i in range(len(study.images))])

    return study.kept(version, "maps", spreads)


def _show_maps(study: _Study, maps: Measured, step: int, noises: int) -> None:
    results, pictures = study.results, len(study.images)
    results.table("maps", [
        {"model": version, "position": position, "picture": i, "row": y, "column": x, "std": value}
        for version, _, position, array in study.each(maps)
        for (i, y, x), value in np.ndenumerate(array)
    ])  # fmt: skip
    rows = [(study.named(version, position), array) for version, _, position, array in study.each(maps)]
    figure, axes = figures.panels(
        1 + len(rows), pictures, height=1.95,
        title=f"Standard deviation over {noises} noises at t = {step} (hot: black is 0, white the top of the row)",
    )  # fmt: skip
    for i, image in enumerate(study.images):
        _bare(axes[i]).imshow(image)
    told = []
    for number, (name, array) in enumerate(rows, 1):
        here = axes[number * pictures : (number + 1) * pictures]
        top = float(f"{array.max() * 1.05:.2g}")
        for ax, one in zip(here, array, strict=True):
            shown = _bare(ax).imshow(one, cmap=SPREAD_MAP, vmin=0, vmax=top, interpolation="nearest")
            ax.set_title(f"mean {one.mean():.2f}", fontsize=10)
        with figures.style():
            here[0].set_ylabel(f"{name}\n(0 to {top:g})", fontsize=10)
            figure.colorbar(shown, ax=here, shrink=0.9)
        ratio = array.reshape(pictures, -1)
        told.append(
            f"{name}: mean {array.mean():.3g}, from {ratio.mean(1).min():.3g} to {ratio.mean(1).max():.3g} between "
            f"pictures; inside a picture the place that moves most moves {(ratio.max(1) / ratio.min(1)).mean():.1f} "
            "times as far as the one that moves least."
        )
    results.figure("maps", figure, f"Mean over channels; each row has a scale of its own. {' '.join(told)}")


def _over_time(study: _Study, version: str, steps: Sequence[int], noises: int) -> list[np.ndarray]:
    """For each position (2, pictures, steps): mean spread, and the same over the mean |value|."""

    @cache
    def found() -> np.ndarray:
        def one(representation: Any) -> tuple[float, float]:
            far = float(spread(representation).mean())
            return far, far / float(representation.abs().mean())

        every = [
            [[one(x) for x in study.shown(i, step, range(noises)).values()] for step in steps]
            for i in range(len(study.images))
        ]
        return np.array(every).transpose(2, 3, 0, 1)  # (positions, 2, pictures, steps)

    return study.kept(version, "over-time", lambda number: found()[number])


def _show_over_time(study: _Study, over_time: Measured, steps: Sequence[int], noises: int) -> None:
    study.results.table("over_time", [
        {"model": version, "position": position, "picture": i, "t": t, "std": array[0, i, j],
         "std_over_mean_abs": array[1, i, j]}
        for version, _, position, array in study.each(over_time)
        for i in range(array.shape[1])
        for j, t in enumerate(steps)
    ])  # fmt: skip
    figure, axes = figures.panels(1, 2, title=f"How far {noises} noises move representations of a picture")
    names = ("mean standard deviation", "mean standard deviation / mean |value|")
    told = []
    for part, (ax, y_name) in enumerate(zip(axes, names, strict=True)):
        curves = {study.named(v, p): a[part].mean(0) for v, _, p, a in study.each(over_time)}
        band = {study.named(v, p): (a[part].min(0), a[part].max(0)) for v, _, p, a in study.each(over_time)}
        figures.lines(ax, list(steps), curves, x_name=TIME, y_name=y_name, spread=band)
        ax.set_ylim(bottom=0)
    for version, _, position, (far, relative) in study.each(over_time):
        told.append(
            f"{study.named(version, position)}: {far[:, 0].mean():.3g} at t = {steps[0]}, {relative[:, 0].mean():.0%} "
            f"of the mean |value|; {far[:, -1].mean():.3g} at t = {steps[-1]}, {relative[:, -1].mean():.0%} of it."
        )
    study.results.figure("over_time", figure, f"Bands from least to most of the pictures. {' '.join(told)}")


def _similar(study: _Study, version: str, step: int) -> np.ndarray:
    """(pictures, h, w): cosine of each place with the middle of the first picture, all positions' channels at once."""

    def cosines() -> np.ndarray:
        seed = study.subject.seed
        all_channels = [concat(study.shown(i, step, [seed]))[0] for i in range(len(study.images))]
        y, x = (edge // 2 for edge in all_channels[0].shape[1:])
        one = all_channels[0][:, y : y + 1, x : x + 1]
        return np.stack([similarity(one, other)[0, 0].numpy() for other in all_channels])

    return study.results.kept(f"{version}-similarity", cosines)


def _show_similarity(study: _Study, measured: Measured, step: int) -> None:
    pictures = len(study.images)
    found = {version: arrays[0] for version, arrays in measured.items()}
    study.results.table("similarity", [
        {"model": version, "picture": i, "row": y, "column": x, "cosine": value}
        for version, array in found.items()
        for (i, y, x), value in np.ndenumerate(array)
    ])  # fmt: skip
    figure, axes = figures.panels(
        1 + len(found), pictures, height=1.95,
        title=f"Likeness to the middle (+) of the first picture: cosine at t = {step}",
    )  # fmt: skip
    told = []
    for i, image in enumerate(study.images):
        _bare(axes[i]).imshow(image)
    grid = next(iter(found.values())).shape[1:]
    y, x = ((cells // 2 + 0.5) / cells * edge for cells, edge in zip(grid, study.images.shape[1:3], strict=True))
    axes[0].plot(x, y, "+", color="white", markersize=14, markeredgewidth=3)
    axes[0].plot(x, y, "+", color="black", markersize=12, markeredgewidth=1)
    low = min(float(array.min()) for array in found.values())
    for number, (version, array) in enumerate(found.items(), 1):
        here = axes[number * pictures : (number + 1) * pictures]
        for ax, one in zip(here, array, strict=True):
            shown = _bare(ax).imshow(one, cmap=figures.MAP, vmin=low, vmax=1, interpolation="nearest")
            ax.set_title(f"most {one.max():.2f}, mean {one.mean():.2f}", fontsize=10)
        with figures.style():
            here[0].set_ylabel(version, fontsize=10)
            figure.colorbar(shown, ax=here, shrink=0.9)
        most = ", ".join(f"{one.max():.2f}" for one in array[1:]) or "none"
        told.append(f"{version}: the most similar places of the other pictures have {most}.")
    told.append(f"Channels of {' and '.join(study.positions)} together.")
    study.results.figure("similarity", figure, " ".join(told))


def _bare(ax: Axes) -> Axes:
    """Without ticks, grid and frame."""
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax
