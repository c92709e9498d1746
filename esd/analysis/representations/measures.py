"""What is measured of representations: sizes, channel by channel, and how far noise moves them, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from esd.analysis.results import Results
from esd.analysis.subject import Subject

from .extract import Representations, channel_levels, concat, generate, img2repr, similarity, spread

Measured = Mapping[str, Sequence[np.ndarray]]  # version to an array for each position


@dataclass(frozen=True)
class Study:
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


def levels(study: Study, version: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
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


def channels(study: Study, version: str, steps: Sequence[int]) -> list[np.ndarray]:
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


def maps(study: Study, version: str, step: int, noises: int) -> list[np.ndarray]:
    """For each position (pictures, h, w): spread at each place."""

    @cache
    def shown(i: int) -> Representations:
        return study.shown(i, step, range(noises))

    def spreads(number: int) -> np.ndarray:
        position = study.positions[number]
        return np.stack([spread(shown(i)[position]).numpy() for i in range(len(study.images))])

    return study.kept(version, "maps", spreads)


def over_time(study: Study, version: str, steps: Sequence[int], noises: int) -> list[np.ndarray]:
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


def similar(study: Study, version: str, step: int) -> np.ndarray:
    """(pictures, h, w): cosine of each place with the middle of the first picture, all positions' channels at once."""

    def cosines() -> np.ndarray:
        seed = study.subject.seed
        all_channels = [concat(study.shown(i, step, [seed]))[0] for i in range(len(study.images))]
        y, x = (edge // 2 for edge in all_channels[0].shape[1:])
        one = all_channels[0][:, y : y + 1, x : x + 1]
        return np.stack([similarity(one, other)[0, 0].numpy() for other in all_channels])

    return study.results.kept(f"{version}-similarity", cosines)
