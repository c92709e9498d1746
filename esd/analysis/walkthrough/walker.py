"""`Walk`: who walks, what is drawn on the way, and where results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

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

    def rows(self) -> list[str]:
        """Labels of rows of pictures."""
        return [f"seed {seed}" for seed in self.seeds]
