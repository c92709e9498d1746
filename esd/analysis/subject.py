"""`Subject`: the model that an analysis looks into, how it is sampled, and who reads what it draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from esd import checkpoint
from esd.checkpoint import Erased
from esd.evaluation.generate import base_of
from esd.evaluation.judges import EmojiJudge
from esd.evaluation.pixels import as_uint8
from esd.evaluation.vocabulary import Vocabulary
from esd.families import Family
from esd.interventions import Op, Source, sample


@dataclass(frozen=True)
class Subject:
    """What is looked into.

    Attributes:
        family: of the base, with denoiser and decoder on their device.
        checkpoint: of an erased model, looked at beside the base; None for the base alone.
        vocabulary: what the model knows, or None.
        judge: reads its pictures, or None.
        num_steps: sampling steps.
        guidance_scale: see `esd.trajectory.rollout`.
        seed: of the first picture; those after it count up.
        batch_size: most pictures in one batch, those that only serve as a source not counted.
    """

    family: Family
    checkpoint: Erased | None = None
    vocabulary: Vocabulary | None = None
    judge: EmojiJudge | None = None
    num_steps: int = 20
    guidance_scale: float = 4.0
    seed: int = 0
    batch_size: int = 16

    def facts(self) -> dict[str, Any]:
        """What says which model is looked into and how it is sampled, see `Results.hold`."""
        erased, judge, vocabulary = self.checkpoint, self.judge, self.vocabulary
        return {
            "base": base_of(self.family),
            "checkpoint": erased.identity() if erased else None,
            "judge": {"name": judge.name, "hash": judge.hash} if judge else None,
            "vocabulary": {"hash": vocabulary.hash} if vocabulary else None,
            "steps": {name: getattr(self, name) for name in ("num_steps", "guidance_scale", "seed")},
        }

    @property
    def versions(self) -> tuple[str, ...]:
        """Of the model: "base", and "erased" where there is a checkpoint."""
        return ("base", "erased") if self.checkpoint else ("base",)

    @contextmanager
    def wearing(self, version: str) -> Iterator[Family]:
        """The family as base or erased, for the length of a `with` block.

        Raises:
            CheckpointError: the checkpoint is of another base.
        """
        if version == "base" or self.checkpoint is None:
            yield self.family
            return
        with checkpoint.erased(self.family.pipe, self.checkpoint):
            yield self.family

    def seeds(self, count: int) -> list[int]:
        """As many seeds as are asked for, the same every time."""
        return list(range(self.seed, self.seed + count))

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *ops: Op) -> np.ndarray:
        """Pictures under ops, batch after batch.

        Args:
            prompts: n texts.
            seeds: n seeds.
            ops: see `esd.interventions.sample`; those that name rows fit one batch only.

        Returns:
            uint8 RGB (n, H, W, 3).

        Raises:
            UserError: see `esd.interventions.sample`.
        """
        drawn = []
        for i in range(0, len(prompts), self.batch_size):
            rows = slice(i, i + self.batch_size)
            images = sample(
                self.family, prompts[rows], seeds[rows], *ops,
                num_steps=self.num_steps, guidance_scale=self.guidance_scale,
            ).images  # fmt: skip
            drawn.append(as_uint8(images))
        return np.concatenate(drawn)

    def draw_from(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sources: Sequence[Source],
        make: Callable[[Source, tuple[int, ...]], Op],
    ) -> np.ndarray:
        """Pictures that each take something from a run of their own.

        Args:
            prompts: n texts.
            seeds: n seeds.
            sources: n other runs; of equal ones a batch draws one.
            make: the op for a source and the rows of the batch that take from it.

        Returns:
            uint8 RGB (n, H, W, 3).

        Raises:
            UserError: see `esd.interventions.sample`.
        """
        drawn = []
        for i in range(0, len(prompts), self.batch_size):
            batch = slice(i, i + self.batch_size)
            rows: dict[Source, tuple[int, ...]] = {}
            for row, source in enumerate(sources[batch]):
                rows[source] = (*rows.get(source, ()), row)
            ops = [make(source, taking) for source, taking in rows.items()]
            drawn.append(self.draw(prompts[batch], seeds[batch], *ops))
        return np.concatenate(drawn)

    @cached_property
    def distance_name(self) -> str:
        """What `distance` is, for the axis of a figure."""
        return "distance in the judge's features" if self.judge else "distance in pixels (root mean square, 0 to 1)"

    def distance(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """How far pictures are apart: in the judge's features, without a judge in pixels.

        Args:
            before: uint8 RGB (n, H, W, 3).
            after: the same.

        Returns:
            (n,) from 0 upwards.
        """
        one, other = (self.features(images) for images in (before, after))
        return np.sqrt(((one - other) ** 2).mean(axis=1))

    def features(self, images: np.ndarray) -> np.ndarray:
        """What `distance` compares (n, d) of uint8 RGB pictures (n, H, W, 3): the judge's features, or pixels."""
        if self.judge:
            return self.judge.features(images)
        return images.reshape(len(images), -1).astype(np.float64) / 255
