"""`Walk`: who walks, what is drawn on the way, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from esd.analysis import figures
from esd.analysis.edits import seen
from esd.analysis.results import Results
from esd.analysis.subject import Subject
from esd.evaluation.pixels import images_of
from esd.families import Conditioning, Family

COLUMNS = 8  # most pictures in a strip


@dataclass(frozen=True)
class Walk:
    """Who walks: the model, where results go, what is drawn."""

    subject: Subject
    results: Results
    prompt: str
    other: str
    seeds: list[int]

    @property
    def family(self) -> Family:
        """Of the model."""
        return self.subject.family

    def told(self, prompt: str) -> Conditioning:
        """A prompt, a row for each seed."""
        return self.family.encode([prompt] * len(self.seeds))

    def pictures(self, name: str, make: Callable[[], torch.Tensor]) -> np.ndarray:
        """uint8 RGB (seeds, H, W, 3) of latents, kept."""
        return self.results.kept(name, lambda: images_of(self.family, make()))

    def reading(self, images: np.ndarray, prompt: str) -> dict[str, float | None]:
        """See `esd.analysis.edits.seen`."""
        return seen(self.subject, images, [prompt] * len(images))

    def across(self, values: Sequence[float], images: Sequence[np.ndarray], *, title: str, name: str) -> Figure:
        """The pictures of each value of a setting, a column for each, a row for each seed."""
        columns = [f"{value:g}" for value in values]
        return figures.pictures(
            np.stack(images, axis=1), title=title, rows=self.rows(), columns=columns, column_name=name
        )

    def rows(self) -> list[str]:
        """Labels of rows of pictures."""
        return [f"seed {seed}" for seed in self.seeds]


def share_seen(rows: Sequence[Mapping[str, Any]], at: str, what: str, *columns: str) -> str:
    """A sentence on the share of pictures in which the judge sees something, row for row; empty where it cannot tell.

    Args:
        rows: of a table.
        at: names a row, with its cells in braces.
        what: is seen.
        columns: that hold the shares, or None.
    """
    known = [row for row in rows if all(row[column] is not None for column in columns)]
    told = "; ".join(f"{at.format(**row)}: {' and '.join(f'{row[one]:.0%}' for one in columns)}" for row in known)
    return f" Share in which the judge sees {what}: {told}." if told else ""
