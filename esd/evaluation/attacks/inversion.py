"""Textual inversion: learn the embedding of a new word <v>, and ask for "a <v>" where the concept's name was.

Unlike a soft prompt the new word goes through the text encoder, so it could be handed out as a file of one embedding.
The tokenizer and the table of embeddings are never touched: an ordinary word that no prompt holds stands in for <v>,
and what the table gives for it is replaced on the way.

Source: Pham et al. 2023, "Circumventing Concept Erasure" (arXiv:2308.01508), who take 5000 updates of 16 rows at a rate
of 0.08 (esd/train.sh: 5e-3, scaled by batch and accumulation). The defaults are those of Lu et al. 2025
(arXiv:2505.17013), src/probes/textual_inversion_probe.py: 3000 updates of 4 rows at 2e-3 (5e-4, scaled). Both begin at
the embedding of a neutral word, which a small vocabulary does not have; here <v> begins at the mean of the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from esd.errors import UserError
from esd.evaluation.attacks.learning import LearningAttack, Reader
from esd.evaluation.attacks.subject import Subject
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.prompts import PromptRow
from esd.families import Conditioning, Family
from esd.families.base import Part
from esd.families.unet import UNetFamily


@dataclass(frozen=True)
class Inversion(LearningAttack):
    """One new word for all rows, an embedding in each text encoder.

    Attributes:
        concept: the words that <v> takes the place of, in every row's prompt: "cat" in "a cat in the mosaic style".
    """

    name: ClassVar[str] = "inversion"
    parts: ClassVar[tuple[Part, ...]] = ("encoders", "denoiser", "vae")
    concept: str = ""
    steps: int = 3000
    lr: float = 2e-3
    every: int = 500

    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Refuses models other than UNets that CLIP reads for, and rows without the concept's name."""
        if not isinstance(family, UNetFamily):
            raise UserError(
                f"attack inversion: {family.name} is read for by other encoders than CLIP's alone; allowed: Stable "
                "Diffusion 1, 2 and XL; attack it with soft_prompt"
            )
        if not self.concept.strip():
            raise UserError("inversion.concept is empty; give the words of the prompts that <v> stands in for: 'cat'")
        for row in rows:
            if not self._pattern().search(row.prompt):
                raise UserError(
                    f"inversion.concept is {self.concept!r}, and row {row.case_number}, {row.prompt!r}, does not hold "
                    "it; leave the row out or name the concept as it does"
                )

    def start(self, subject: Subject) -> list[Tensor]:
        """The mean of each encoder's table [(d,), ...]."""
        return [table.weight.detach().float().mean(0) for table in _family(subject).embedding_tables()]

    def reader(self, subject: Subject) -> Reader:
        """The rows' prompts with <v> for the concept."""
        family, prompts = _family(subject), [row.prompt for row in subject.rows]
        word = family.unused_word(prompts)
        asked = [self._pattern().sub(word, prompt) for prompt in prompts]

        def read(vectors: Sequence[Tensor], rows: Sequence[int]) -> Conditioning:
            return family.encode_with([asked[i] for i in rows], word, vectors)

        return read

    def _pattern(self) -> re.Pattern[str]:
        """The concept as a whole word."""
        return re.compile(rf"(?<!\w){re.escape(self.concept.strip())}(?!\w)", re.IGNORECASE)


def _family(subject: Subject) -> UNetFamily:
    """The subject's family, which `check` has seen to be one of a UNet."""
    assert isinstance(subject.family, UNetFamily)
    return subject.family
