"""Training points and all that the teacher says of them, and the prompts they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from esd.families.base import Conditioning
from esd.objectives import Anchor


@dataclass(frozen=True)
class Conditions:
    """What is erased, from what, and the null prompt.

    Attributes:
        concept: one row for each training prompt (P rows).
        null: one row, that of `Family.null` for the objective.
        erase_from: P rows, or None: the prompts from which the concept is removed as an attribute.
        sample_with: x_t comes from a rollout with "erase_from" (where there is one) or always with the
            "concept", as alt_esd_diffusers.py does.
        negative: one row, the negative prompt of rollouts; None for `null`.

    Raises:
        ValueError: the numbers of rows do not fit.
    """

    concept: Conditioning
    null: Conditioning
    erase_from: Conditioning | None = None
    sample_with: Literal["erase_from", "concept"] = "erase_from"
    negative: Conditioning | None = None

    def __post_init__(self) -> None:
        if len(self.null) != 1 or (self.erase_from is not None and len(self.erase_from) != len(self.concept)):
            raise ValueError("conditions need one null row and as many erase_from rows as concept rows")

    @property
    def student(self) -> Conditioning:
        """What the student is conditioned on (P rows); index it with `Points.prompt`."""
        return self.concept if self.erase_from is None else self.erase_from

    @property
    def rolled(self) -> Conditioning:
        """What rollouts are conditioned on (P rows)."""
        return self.concept if self.sample_with == "concept" else self.student


@dataclass(frozen=True)
class Points:
    """Training points with everything the teacher has to say about them; b of them, float32.

    Attributes:
        x: what the denoiser gets (b, c, h, w), already through `Family.model_input`.
        t: its time (b,).
        prompt: row of `Conditions` it belongs to (b,), int64.
        concept: teacher's prediction for the concept (b, c, h, w).
        null: for the null prompt (b, c, h, w), or None where it is not wanted.
        erase_from: for the prompt erased from (b, c, h, w), or None without one.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    concept: Tensor
    null: Tensor | None = None
    erase_from: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> Points:
        return Points(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Those that are not None, by name; `Points(**points.tensors())` is the same again."""
        return {f.name: tensor for f in fields(self) if (tensor := getattr(self, f.name)) is not None}

    @staticmethod
    def cat(parts: Sequence[Points]) -> Points:
        """One batch after the other."""
        return Points(**{name: torch.cat([getattr(p, name) for p in parts]) for name in parts[0].tensors()})

    def prediction(self, of: Anchor) -> Tensor:
        """What the teacher predicts for "null", "concept" or "erase_from" (b, c, h, w).

        Raises:
            ValueError: it was not asked that, or nothing is erased from anything.
        """
        predicted = {"null": self.null, "concept": self.concept, "erase_from": self.erase_from}[of]
        if predicted is None:
            raise ValueError(f"these points have no such prediction: {of}")
        return predicted
