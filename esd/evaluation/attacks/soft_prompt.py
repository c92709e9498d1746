"""The soft prompt: k free vectors in front of a prompt's text states, learned so that the model draws the concept.

No text needs to give these states, so this is an upper bound of what prompts can do: where it fails, a search over
words with as much effort has little hope; where it succeeds, the concept is still in the weights.

Source: Zhang et al. 2024 (UnlearnDiffAtk, arXiv:2310.11868) for the loss that prompts are learned by; free vectors
instead of tokens: Pham et al. 2023 (arXiv:2308.01508).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from esd import seeding
from esd.errors import UserError
from esd.evaluation.attacks.learning import LearningAttack, Reader, whole
from esd.evaluation.attacks.subject import Subject
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.prompts import PromptRow
from esd.families import Conditioning, Family

STATES = "encoder_hidden_states"


@dataclass(frozen=True)
class SoftPrompt(LearningAttack):
    """k vectors for all rows together; pooled text, where a model has it, stays the prompt's own.

    Attributes:
        tokens: k, at most as many as the model reads.
    """

    name: ClassVar[str] = "soft_prompt"
    tokens: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("soft_prompt.tokens", self.tokens)

    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Refuses more tokens than the model reads."""
        most = family.encode([rows[0].prompt]).tensors[STATES].shape[1]
        if self.tokens > most:
            raise UserError(
                f"soft_prompt.tokens is {self.tokens}; {family.name} reads {most} tokens; allowed: 1 to {most}, "
                "usual are 1 to 4"
            )

    def start(self, subject: Subject) -> list[Tensor]:
        """Random vectors [(k, d)], as large as the prompts' own text states."""
        states = subject.conditioning().tensors[STATES].float()
        source = seeding.generator(subject.seed, "attack start")
        return [torch.randn(self.tokens, states.shape[2], generator=source).to(states) * states.std()]

    def reader(self, subject: Subject) -> Reader:
        """[v; c]: as many of c's last states drop out, so that null and prompt keep one shape.

        They are padding, unless a prompt fills all the tokens that the model reads.
        """
        prompts = subject.conditioning()

        def read(vectors: Sequence[Tensor], rows: Sequence[int]) -> Conditioning:
            told = prompts[list(rows)].tensors
            states = told[STATES]
            free = vectors[0].to(states).expand(len(rows), -1, -1)
            return Conditioning({**told, STATES: torch.cat([free, states[:, : -self.tokens]], 1)})

        return read
