"""What edits do to pictures: how far they move, what a judge still sees in them, and names for where they were made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esd.evaluation.metrics import wilson
from esd.evaluation.vocabulary import DOMAINS
from esd.families import Family
from esd.interventions import InjectText, Op, Site, Skip, Source, layers, resolve

from . import estimates, figures
from .results import Results
from .subject import Subject

KINDS = DOMAINS  # what another prompt differs in
ACROSS = 16  # most columns of a grid of pictures

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Plain:
    """Pictures as the model draws them, which edited ones are held against.

    Attributes:
        subject: that drew them.
        prompts: n texts.
        images: uint8 RGB (n, H, W, 3).
        unit: mean distance between pictures of different prompts, or of one prompt's where there is no other; distances
            are told in it, so that 1 is as far as another picture.
    """

    subject: Subject
    prompts: Sequence[str]
    images: np.ndarray
    unit: float = field(init=False)

    def __post_init__(self) -> None:
        """Measures the unit."""
        n = len(self.images)
        pairs = [(i, j) for i in range(n) for j in range(i)]
        pairs = [pair for pair in pairs if self.prompts[pair[0]] != self.prompts[pair[1]]] or pairs
        apart = (
            self.subject.distance(*(self.images[[pair[side] for pair in pairs]] for side in (0, 1))) if pairs else 1.0
        )
        object.__setattr__(self, "unit", float(np.mean(apart)) or 1.0)

    def moved(self, images: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """How far edited pictures are from these, in units (n,).

        Args:
            images: uint8 RGB (n, H, W, 3).
            rows: of these pictures, n; None for all.
        """
        return self.subject.distance(self.images if rows is None else self.images[rows], images) / self.unit


class Study:
    """Pictures of one model under edits of its layers, each drawn once.

    Attributes:
        texts: prompts, each as often as it has pictures.
        seeds: of the pictures.
        layers: see `esd.interventions.layers`.
        readers: see `readers`.
        flows: whether the text goes on from layer to layer.
        plain: version of the model to its unedited pictures.

    Args:
        subject: the model.
        results: keeps the pictures.
        prompts: drawn with and without edits.
        pictures: of each prompt.
        others: kind of swap to prompt to the other prompt.
    """

    def __init__(
        self,
        subject: Subject,
        results: Results,
        prompts: Sequence[str],
        pictures: int,
        others: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.subject, self.results, self.family, self.others = subject, results, subject.family, others
        self.texts = [prompt for prompt in prompts for _ in range(pictures)]
        self.seeds = [seed for _ in prompts for seed in subject.seeds(pictures)]
        self.layers, self.readers = layers(self.family), readers(self.family)
        self.flows = self.readers[0].reads == "both"
        self.family.encode([*prompts, *(text for told in others.values() for text in told.values())])
        self.family.null()
        self.family.place("denoiser", "vae")  # the encoders have done their work
        self._pictures, self._unused = pictures, subject.seeds(pictures + 2)[-2:]
        self.plain = {
            version: Plain(
                subject, self.texts, self.drawn(version, "plain", lambda: subject.draw(self.texts, self.seeds))
            )
            for version in subject.versions
        }

    def first(self, count: int) -> np.ndarray:
        """Numbers of the first so many pictures of each prompt; all of them where there are no more."""
        return np.array([i for i in range(len(self.texts)) if i % self._pictures < count])

    def asked(self, rows: np.ndarray) -> tuple[list[str], list[int]]:
        """Prompts and seeds of some pictures."""
        return [self.texts[i] for i in rows], [self.seeds[i] for i in rows]

    def drawn(self, version: str, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` draws with this version of the model, kept under a name."""

        def made() -> np.ndarray:
            with self.subject.wearing(version):
                return make()

        return self.results.kept(f"{version}-{name}", made)

    def without(self, version: str, first: int, last: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Pictures without the layers from first to last: all, or those of some rows."""
        if rows is not None and first == last:
            return self.without(version, first, last)[rows]
        texts, seeds = self.asked(np.arange(len(self.texts)) if rows is None else rows)
        op = Skip(where(self.layers[first : last + 1]))
        return self.drawn(version, f"without-{first}-{last}", lambda: self.subject.draw(texts, seeds, op))

    def of_others(self, version: str, rows: np.ndarray) -> np.ndarray:
        """Unedited pictures (kinds, rows, H, W, 3) of the other prompts, from the own seeds."""
        texts, seeds = self.asked(rows)
        asked = [self.others[kind][text] for kind in KINDS for text in texts]
        return _by_kind(self.drawn(version, "others", lambda: self.subject.draw(asked, seeds * len(KINDS))))

    def injected(self, version: str, rows: np.ndarray, first: int, last: int, source: int = 0) -> np.ndarray:
        """Pictures (kinds, rows, H, W, 3) whose layers from first to last of `readers` read the other prompts' text.

        Args:
            version: of the model.
            rows: of the pictures.
            first: number of a layer.
            last: number of a layer.
            source: 0 or 1, for one of two seeds that the other run is drawn from.
        """
        place = where(self.readers[first : last + 1])

        def make(run: Source, taking: tuple[int, ...]) -> Op:
            return InjectText(place, source=run, rows=taking)

        return _by_kind(self.taking(version, f"text-{first}-{last}-{source}", rows, KINDS, make, source))

    def taking(
        self,
        version: str,
        name: str,
        rows: np.ndarray,
        kinds: Sequence[str | None],
        make: Callable[[Source, tuple[int, ...]], Op],
        source: int = 0,
    ) -> np.ndarray:
        """Pictures that take something from runs of another seed.

        Args:
            version: of the model.
            name: to keep them under.
            rows: of the pictures.
            kinds: of swaps, one after the other: which prompt the other run has; None for the own.
            make: see `Subject.draw_from`.
            source: see `injected`.
        """
        texts, seeds = self.asked(rows)
        runs = [
            Source(self.others[kind][text] if kind else text, self._unused[source]) for kind in kinds for text in texts
        ]
        count = len(kinds)
        return self.drawn(version, name, lambda: self.subject.draw_from(texts * count, seeds * count, runs, make))


def _by_kind(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(KINDS), -1, *images.shape[1:])


def mean_of(moved: np.ndarray) -> dict[str, float | None]:
    """The mean of distances (n,), and half the width of its 95% interval; None of one."""
    found = estimates.mean(moved)
    return {"moved": found.value, "interval": found.half}


def picked(values: Iterable[int], count: int) -> list[int]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    every = list(values)
    if len(every) <= count:
        return every
    return [every[round(i * (len(every) - 1) / (count - 1))] for i in range(count)]


def seen(subject: Subject, images: np.ndarray, prompts: Sequence[str]) -> dict[str, float | None]:
    """The share of pictures in which the judge sees the thing, and the style, that their prompts name.

    Args:
        subject: whose judge and vocabulary are asked.
        images: uint8 RGB (n, H, W, 3).
        prompts: n texts.

    Returns:
        See `rate`, for "thing" and for "style"; of the pictures whose prompt names one.
    """
    if subject.judge is None or subject.vocabulary is None:
        return {key: value for domain in DOMAINS for key, value in rate(domain, []).items()}
    read = subject.judge(images)
    told = [subject.vocabulary.named(prompt) for prompt in prompts]
    right = {domain: [read.says(i, domain, t[domain]) for i, t in enumerate(told) if domain in t] for domain in DOMAINS}
    return {key: value for domain, found in right.items() for key, value in rate(domain, found).items()}


def rate(name: str, answers: Sequence[bool | int]) -> dict[str, float | None]:
    """{name, name_low, name_high, name_n}: a share in [0, 1], its 95% Wilson interval, of how many; None of none."""
    n = len(answers)
    share, low, high = (sum(answers) / n, *wilson(sum(answers), n)) if n else (None, None, None)
    return {name: share, f"{name}_low": low, f"{name}_high": high, f"{name}_n": n}


def column(rows: Rows, name: str) -> np.ndarray:
    """A column of a table (rows,); nan where it has nothing."""
    return np.array([row[name] for row in rows], float)


def band(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper ends of a column's intervals (rows,), nan where there is none."""
    return column(rows, f"{name}_low"), column(rows, f"{name}_high")


def whiskers(rows: Rows, name: str) -> np.ndarray:
    """How far the interval of a `rate` reaches below and above it in each row (2, rows)."""
    return np.array(
        [[row[name] - row[f"{name}_low"] for row in rows], [row[f"{name}_high"] - row[name] for row in rows]]
    )


def told_rate(row: Mapping[str, Any], name: str) -> str:
    """A `rate` and its interval: 81% [57 to 93]."""
    return f"{row[name]:.0%} [{100 * row[f'{name}_low']:.0f} to {100 * row[f'{name}_high']:.0f}]"


def windows(count: int, lengths: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """(first, last) of all runs of consecutive layers, short ones first; of these lengths, or of every length."""
    for length in lengths or range(1, count + 1):
        for first in range(count - length + 1):
            yield first, first + length - 1


def where(sites: Sequence[Site]) -> str:
    """An expression that names these sites."""
    return " + ".join(site.expression for site in sites)


def short(site: Site) -> str:
    """A name for an axis: "up1.a0" for attention 0 of up block 1, "r0" for a resnet, "double3"."""
    inside = re.findall(r"\.(attentions|resnets|transformer_blocks)\.(\d+)", site.path)
    words = [f".{kind[0]}{number}" for kind, number in inside if kind[0] != "t" or int(number)]
    return f"{site.stack}{site.index}" + "".join(words)


def readers(family: Family) -> list[Site]:
    """The layers that read the text, in the order they run: blocks of a transformer; cross-attentions of a UNet."""
    return [site for site in layers(family) if site.reads == "both"] or resolve(family, "cross")


def selection(family: Family, chosen: Sequence[Site]) -> str:
    """What trains some of the layers that read the text, and nothing else: esd_x confined to them.

    Args:
        family: of the model.
        chosen: of `readers`.

    Returns:
        An expression of `esd.selection`, with ranges where whole blocks follow each other.
    """
    every = readers(family)
    words: list[str] = []
    for stack in dict.fromkeys(site.stack for site in chosen):
        whole: list[int] = []
        for index in dict.fromkeys(site.index or 0 for site in chosen if site.stack == stack):
            mine, all_there = (
                [s for s in sites if s.stack == stack and (s.index or 0) == index] for sites in (chosen, every)
            )
            if len(mine) == len(all_there):
                whole.append(index)
            else:
                words += [site.expression for site in mine]
        while whole:
            last = whole[0]
            while last + 1 in whole:
                last += 1
            words.append(f"{stack}[{whole[0]}]" if last == whole[0] else f"{stack}[{whole[0]}:{last + 1}]")
            whole = [index for index in whole if index > last]
    return f"esd_x & ({' + '.join(words)})" if len(words) > 1 else f"esd_x & {words[0]}"


def draw_windows(
    study: Study, name: str, rows: Rows, by: str, layers: Sequence[str], unit: str, title: str, caption: str
) -> None:
    """Draws a measure of every window as a map of its first and last layer, a panel for each version."""
    figure, axes = figures.panels(
        1, len(study.plain), title=title, height=min(8.0, 2.4 + 0.3 * len(layers)) if len(study.plain) == 1 else 4.6
    )
    values = [row[by] for row in rows]
    for ax, version in zip(axes, study.plain, strict=True):
        matrix = np.full((len(layers), len(layers)), np.nan)
        for row in rows:
            if row["version"] == version:
                matrix[layers.index(row["first"]), layers.index(row["last"])] = row[by]
        figures.heat(
            ax, matrix, rows=layers, columns=layers, y_name="first layer", x_name="last layer", unit=unit,
            title=version if len(study.plain) > 1 else "", limits=(min(0.0, *values), max(values)),
            tell=len(layers) <= ACROSS and len(study.plain) == 1,
        )  # fmt: skip
    study.results.figure(name, figure, caption)


def told(study: Study, rows: np.ndarray | None = None) -> str:
    """Which prompts were drawn."""
    texts = list(dict.fromkeys(study.texts if rows is None else [study.texts[i] for i in rows]))
    return f"{len(texts)} prompt{'s' * (len(texts) > 1)} such as {texts[0]!r}"
