"""Tables and figures of what is measured of representations."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from esd.analysis import figures

from .measures import Measured, Study

SPREAD_MAP = "hot"
TIME = "time t (1000 is noise)"


def show_levels(study: Study, levels: Measured) -> None:
    """Size over time, while drawing and of the finished picture."""
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


def show_channels(
    study: Study, channels: Measured, times: Sequence[int], steps: Sequence[int], histogram_step: int
) -> None:
    """Size of each channel at `steps`, and a histogram at `histogram_step`, of what was measured at `times`."""
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


def _show_histogram(study: Study, channels: Measured, step: int) -> None:
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


def show_maps(study: Study, maps: Measured, step: int, noises: int) -> None:
    """Spread over noises at each place, beside the pictures."""
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


def show_over_time(study: Study, over_time: Measured, steps: Sequence[int], noises: int) -> None:
    """Mean spread over time, as it is and over the mean |value|."""
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
        figures.from_zero(ax)
    for version, _, position, (far, relative) in study.each(over_time):
        told.append(
            f"{study.named(version, position)}: {far[:, 0].mean():.3g} at t = {steps[0]}, {relative[:, 0].mean():.0%} "
            f"of the mean |value|; {far[:, -1].mean():.3g} at t = {steps[-1]}, {relative[:, -1].mean():.0%} of it."
        )
    study.results.figure("over_time", figure, f"Bands from least to most of the pictures. {' '.join(told)}")


def show_similarity(study: Study, measured: Measured, step: int) -> None:
    """Likeness of each place to the middle of the first picture, beside the pictures."""
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
