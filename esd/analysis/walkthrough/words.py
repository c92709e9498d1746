"""Words on their way into a model: token and position embeddings, one word's in another's place, and a new word.

All of this is of models whose prompts CLIP alone reads: Stable Diffusion 1, 2 and XL.

Source: fast.ai's "Stable Diffusion Deep Dive" notebook; textual inversion of Gal et al. 2022 (arXiv:2208.01618),
learned here by `esd.evaluation.attacks.Inversion`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esd import checkpoint
from esd.analysis.subject import Subject
from esd.errors import UserError
from esd.evaluation.attacks.inversion import Inversion
from esd.evaluation.attacks.subject import Model
from esd.evaluation.attacks.subject import Subject as Attacked
from esd.evaluation.pixels import images_of
from esd.evaluation.prompts import PromptRow
from esd.families import Conditioning
from esd.families.unet import UNetFamily

from .drawing import attacked


@dataclass(frozen=True)
class InputEmbeddings:
    """What the first text encoder begins with: the embedding of each token plus that of its place.

    Attributes:
        tokens: as the tokenizer writes them, n.
        token: (n, d).
        position: (n, d).
        read: (n, d), what the encoder's first layer gets.
        places: of every place that there is (all, d).
    """

    tokens: list[str]
    token: Tensor
    position: Tensor
    read: Tensor
    places: Tensor


@torch.no_grad()
def input_embeddings(family: UNetFamily, prompt: str) -> InputEmbeddings:
    """Of a prompt, without its padding."""
    words, encoder = family.pipe.tokenizer, family.pipe.text_encoder
    inside: Any = next(m for m in encoder.modules() if hasattr(m, "position_embedding"))
    numbers = words(prompt).input_ids[: words.model_max_length]
    ids = torch.tensor([numbers], device=inside.token_embedding.weight.device)
    places = inside.position_embedding.weight.detach().float().cpu()
    token = inside.token_embedding(ids)[0].float().cpu()
    read = inside(input_ids=ids)[0].float().cpu()
    return InputEmbeddings(words.convert_ids_to_tokens(numbers), token, places[: len(numbers)], read, places)


def swapped(family: UNetFamily, prompts: Sequence[str], word: str, other: str) -> Conditioning:
    """The prompts read with the embedding of another word in the place of one.

    Raises:
        UserError: one of them is several tokens.
    """
    family.embeddings_of(word)
    return family.encode_with(prompts, word, family.embeddings_of(other))


@dataclass(frozen=True)
class Learning(Inversion):
    """Textual inversion from drawings.

    Attributes:
        drawings: clean latents (m, c, h, w) to learn from, the first of the first row, and round again; None has the
            base draw `examples` of the rows' prompts.
    """

    name: ClassVar[str] = "walkthrough.new_word"
    drawings: Tensor | None = field(default=None, repr=False)

    def known(self, subject: Attacked, row_of: Sequence[int]) -> Tensor:
        """The drawings, or what the model draws."""
        if self.drawings is None:
            return super().known(subject, row_of)
        return self.drawings[[i % len(self.drawings) for i in range(len(row_of))]]


@dataclass(frozen=True)
class Learned:
    """A new word at one point of learning it.

    Attributes:
        update: how many there were.
        loss: on noise that learning never saw.
        images: uint8 RGB (n, H, W, 3), the caption with the new word from n seeds.
        embeddings: (d,) for each text encoder.
    """

    update: int
    loss: float
    images: np.ndarray
    embeddings: list[Tensor]


def learn(subject: Subject, caption: str, word: str, seeds: Sequence[int], learning: Learning) -> list[Learned]:
    """Learns a new word <v> from drawings, and draws with it now and then.

    Args:
        subject: the model; one with a checkpoint wears it, and learns from what the base draws.
        caption: of the drawings, in which <v> takes the place of `word`.
        word: see `caption`.
        seeds: that are drawn from.
        learning: how.

    Raises:
        UserError: the caption lacks the word; or a setting is out of range.
    """
    family = subject.family
    rows = [PromptRow(number, caption, seed) for number, seed in enumerate(seeds)]
    base: Any = checkpoint.base_view(family.pipe) if subject.checkpoint else family.denoiser
    one = attacked(subject, rows, base)
    learning.check(family, rows, one.draw)
    family.encode([caption])
    family.null()
    found = []
    with Model(family, base).at_work(*learning.parts):
        for tried in learning.tries(one):
            vectors = [vector.clone() for vector in tried.found or ()]
            told: Any = tried.tried
            found.append(Learned(told["update"], told["loss"], images_of(family, tried.latents), vectors))
    family.place("denoiser", "vae")
    return found


def with_new_word(family: UNetFamily, prompts: Sequence[str], word: str, embeddings: Sequence[Tensor]) -> Conditioning:
    """Prompts with a learned word in the place of another."""
    stand_in = family.unused_word(prompts)
    asked = [re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", stand_in, prompt) for prompt in prompts]
    with torch.no_grad():
        return family.encode_with(asked, stand_in, embeddings)


def drawings(subject: Subject, files: Sequence[str]) -> Tensor:
    """Clean latents (n, c, h, w) of pictures in files, scaled to the model's size.

    Raises:
        UserError: one cannot be read.
    """
    family = subject.family
    height, width = (edge * family.pipe.vae_scale_factor for edge in family.decoded_shape()[1:])
    return family.encode_images(torch.stack([pixels(file, (width, height)) for file in files]))


def pixels(file: str, size: tuple[int, int]) -> Tensor:
    """(3, height, width) in [0, 1] of a picture, scaled to (width, height); what is transparent is white.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(Path(file)) as opened:
            layered = opened.convert("RGBA")
    except OSError as error:
        raise UserError(f"walkthrough.drawings: {file!r} cannot be read ({error}); give files of pictures") from None
    paper = Image.new("RGBA", layered.size, "white")
    flat = Image.alpha_composite(paper, layered).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1).float() / 255
