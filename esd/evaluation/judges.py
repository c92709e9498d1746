"""Judges: what reads a picture and says what it shows, and the bundled judge of things and styles.

A judge is small: a name, a version, a hash of its weights, the threshold it speaks at, and a call from pictures to a
table: for each question it knows, its best answer and how probable that is. What a picture says is thus kept apart
from what is believed, and the table can be read again under another threshold. The bundled judge is a convolutional
network trained on drawings alone (`scripts/emoji/train_judge.py`); it has never seen a generated picture, and says
"neither" when it is not sure, so a smear is not counted as a cat. `esd.evaluation.judges_by_name` has the others.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from esd.errors import UserError

EMOJI, PHOTOS = "emoji-sd's pictures", "photographs and paintings"  # what judges are known to read


@dataclass(frozen=True)
class Readings:
    """A judge's table, a row per picture.

    Attributes:
        names: question, such as "thing", to the best answer for each of n pictures, whether or not it is believed; ""
            for none.
        p: question to the answers' probabilities, (n,) in [0, 1].
        least: question to the probability below which an answer is not believed; others are believed always.
        parts: of a detector, everything it found in each picture, with its probability; () of other judges.
    """

    names: Mapping[str, list[str]]
    p: Mapping[str, np.ndarray]
    least: Mapping[str, float] = field(default_factory=dict)
    parts: Sequence[Sequence[tuple[str, float]]] = ()

    def __len__(self) -> int:
        return len(next(iter(self.names.values()), []))

    @property
    def neither(self) -> np.ndarray:
        """(n,) bool, True where the thing is not believed: no thing of the judge's list is shown."""
        return self.p["thing"] < self.least.get("thing", 0.0)

    def shows(self, things: Sequence[str]) -> np.ndarray:
        """Return (n,) bool: whether picture i shows `things[i]` and is not "neither"."""
        return np.array([self.says(i, "thing", thing) for i, thing in self._numbered(things)], bool)

    def in_style(self, styles: Sequence[str]) -> np.ndarray:
        """Return (n,) bool: whether picture i is in style `styles[i]`."""
        return np.array([self.says(i, "style", style) for i, style in self._numbered(styles)], bool)

    def says(self, i: int, question: str, name: str) -> bool:
        """Return whether this is the believed answer to a question about picture i."""
        return self.names[question][i] == name and bool(self.p[question][i] >= self.least.get(question, 0.0))

    def _numbered(self, names: Sequence[str]) -> Iterator[tuple[int, str]]:
        """One name for each picture, with the picture's number."""
        return zip(range(len(self)), names, strict=True)


class Judge(Protocol):
    """Reads pictures. Any callable with these attributes is one.

    Attributes:
        name, version, hash: of the judge and of its weights.
        questions: that it answers.
        unsure: those of them whose answer counts only from the threshold upwards.
        threshold: a probability in [0, 1].
        validated: the pictures that it is known to read.
        size: edge of the square pictures that it takes, in pixels; None for any.
    """

    name: str
    version: str
    hash: str
    questions: tuple[str, ...]
    unsure: tuple[str, ...]
    threshold: float
    validated: str
    size: int | None

    def __call__(self, images: np.ndarray) -> Readings:
        """Return the readings of uint8 RGB pictures (n, H, W, 3)."""


@runtime_checkable
class PromptJudge(Protocol):
    """A judge that also says how well pictures agree with the prompts they were drawn from."""

    def agreement(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Return (n,) cosines in [-1, 1] of n uint8 RGB pictures (n, H, W, 3) and n prompts."""


@runtime_checkable
class ListJudge(Protocol):
    """A judge that answers from a list, an answer being all words for one thing, such as "tench, Tinca tinca"."""

    labels: Sequence[str]


@runtime_checkable
class FeatureJudge(Protocol):
    """A judge that also gives the features it reads by, for FID and KID."""

    name: str
    version: str
    hash: str

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return float64 (n, d) of uint8 RGB pictures (n, H, W, 3)."""


class PairJudge(ABC):
    """Says how alike or how far apart two pictures are."""

    name: str
    version: str
    hash: str

    @abstractmethod
    def __call__(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return (n,) values for uint8 RGB pictures (n, H, W, 3)."""


class JudgeNetwork(nn.Module):
    """A residual CNN on 64-pixel pictures with a thing head and a style head.

    Input (b, 3, 64, 64) in [0, 1]; output logits (b, n_things) and (b, n_styles).
    """

    def __init__(self, num_things: int, num_styles: int, widths: Sequence[int] = (32, 64, 128, 192)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        inputs = (widths[0], *widths[:-1])
        self.blocks = nn.ModuleList([_Block(before, after) for before, after in zip(inputs, widths, strict=True)])
        self.thing_head = nn.Linear(widths[-1], num_things)
        self.style_head = nn.Linear(2 * widths[1] + widths[-1], num_styles)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return thing logits and style logits."""
        seen = self.features(images)
        return self.thing_head(seen[:, -self.thing_head.in_features :]), self.style_head(seen)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the style head reads (b, 320): texture, then the deep features that the thing head reads."""
        x = self.stem(images * 2 - 1)
        texture = x
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth == 1:  # style lives in fine texture: its mean and spread early on, as in Gram-matrix style losses
                texture = torch.cat([x.mean((2, 3)), x.float().std((2, 3))], 1)
        return torch.cat([texture, x.mean((2, 3))], 1)


class _Block(nn.Module):
    """Halve the picture, widen the channels: two convolutions beside a pooled shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(x))
        y = F.avg_pool2d(self.conv1(x), 2)
        return self.conv2(F.relu(self.norm2(y))) + self.shortcut(F.avg_pool2d(x, 2))


class EmojiJudge:
    """The bundled judge of 64-pixel pictures, loaded from its folder (`config.json`, `model.safetensors`).

    Raises:
        UserError: the folder holds no judge, or its weights are not those its configuration was written for.
    """

    questions: tuple[str, ...] = ("thing", "style")
    unsure: tuple[str, ...] = ("thing",)
    validated = EMOJI
    size: int | None = 64

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            weights = (folder / "model.safetensors").read_bytes()
        except FileNotFoundError as missing:
            raise UserError(
                f"no judge in '{folder}': {missing.filename} is missing; name a folder made by "
                "scripts/emoji/train_judge.py"
            ) from None
        self.name, self.version = "emoji-judge", str(config["version"])
        self.threshold = float(config["threshold"])
        self.hash = hashlib.sha256(weights).hexdigest()
        if self.hash != config["sha256"]:
            raise UserError(
                f"the judge's weights in '{folder}' have sha256 {self.hash[:12]}..., its configuration says "
                f"{config['sha256'][:12]}...; restore the folder"
            )
        self.things: tuple[str, ...] = tuple(config["things"])
        self.styles: tuple[str, ...] = tuple(config["styles"])
        self.network = JudgeNetwork(len(self.things), len(self.styles)).eval()
        self.network.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
        )

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # a reading must not depend on the precision of what is drawn around it
    def __call__(self, images: np.ndarray, batch: int = 256) -> Readings:
        """Return the readings of uint8 RGB pictures (n, 64, 64, 3), in float32.

        Raises:
            UserError: pictures of another size or type.
        """
        read = [self.network(pixels) for pixels in self._pixels(images, batch)]
        names, p = {}, {}
        for number, (question, known) in enumerate({"thing": self.things, "style": self.styles}.items()):
            likely = torch.cat([torch.zeros(0, len(known)), *(logits[number].softmax(1) for logits in read)])
            best = likely.max(1)
            names[question] = [known[i] for i in best.indices.tolist()]
            p[question] = best.values.numpy()
        return Readings(names, p, {"thing": self.threshold})

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)
    def features(self, images: np.ndarray, batch: int = 256) -> np.ndarray:
        """Return float64 (n, 320): the network's last features of uint8 RGB pictures (n, 64, 64, 3), for FID and KID.

        Raises:
            UserError: pictures of another size or type.
        """
        parts = [self.network.features(pixels) for pixels in self._pixels(images, batch)]
        return torch.cat([torch.zeros(0, self.network.style_head.in_features), *parts]).double().numpy()

    def _pixels(self, images: np.ndarray, batch: int) -> Iterator[torch.Tensor]:
        """Batches of pixels (b, 3, 64, 64) in [0, 1]; raises UserError for pictures of another size or type."""
        if images.ndim != 4 or images.shape[1:] != (64, 64, 3) or images.dtype != np.uint8:
            raise UserError(f"emoji-judge reads uint8 pictures (n, 64, 64, 3), not {images.dtype} {images.shape}")
        for start in range(0, len(images), batch):
            yield torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float() / 255

    def halves(self, images: np.ndarray) -> tuple[Readings, Readings]:
        """Return the readings of the left and of the right half of two-thing scenes (n, 64, 64, 3)."""
        return self(half(images, 0)), self(half(images, 1))


class HalvesJudge:
    """Reads scenes of two things: the first on the left, the second on the right.

    Args:
        judge: reads each half.
    """

    questions: tuple[str, ...] = ("first", "second")
    unsure: tuple[str, ...] = questions
    validated = EMOJI
    size: int | None = 64

    def __init__(self, judge: EmojiJudge) -> None:
        self.judge, self.name = judge, "emoji-halves"
        self.version, self.hash, self.threshold = judge.version, judge.hash, judge.threshold

    def __call__(self, images: np.ndarray) -> Readings:
        """Return the readings of uint8 RGB pictures (n, 64, 64, 3)."""
        read = dict(zip(self.questions, self.judge.halves(images), strict=True))
        names = {side: found.names["thing"] for side, found in read.items()}
        p = {side: found.p["thing"] for side, found in read.items()}
        return Readings(names, p, dict.fromkeys(read, self.threshold))


def half(images: np.ndarray, side: int) -> np.ndarray:
    """Return the left (0) or right (1) half of each picture, mirrored out to the full width."""
    middle = images.shape[2] // 2
    part = images[:, :, :middle] if side == 0 else images[:, :, middle:]
    margin = middle // 2
    return np.pad(part, ((0, 0), (0, 0), (margin, margin), (0, 0)), mode="symmetric")


def load_judge(model: str | Path) -> EmojiJudge | None:
    """Return the judge that a model's `vocabulary.json` names beside it, or None if it names none.

    Raises:
        UserError: it names one that is damaged, or none at all.
    """
    vocabulary = Path(model) / "vocabulary.json"
    if not vocabulary.is_file():
        return None
    try:
        folder = json.loads(vocabulary.read_text()).get("judge")
        return EmojiJudge(Path(model) / folder) if folder else None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{model}: its judge cannot be read ({error!r}); restore that folder") from error
