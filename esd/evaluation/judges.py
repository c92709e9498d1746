"""Judges: what reads a generated picture and says which thing and which style it shows.

A judge is small: a name, a version, the threshold it speaks at, a hash of its weights, and a call from pictures to a
table. The bundled one is a convolutional network trained on drawings alone (`scripts/emoji/train_judge.py`); it has
never seen a generated picture, and says "neither" when it is not sure, so a smear is not counted as a cat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from esd.errors import UserError


@dataclass(frozen=True)
class Readings:
    """A judge's table, a row per picture.

    Attributes:
        thing: the most probable thing's name, whether or not it is believed.
        thing_p: its probability, (n,) in [0, 1].
        style: the most probable style's name.
        style_p: its probability, (n,) in [0, 1].
        neither: (n,) bool, True where `thing_p` is below the judge's threshold: no thing of its list is shown.
    """

    thing: list[str]
    thing_p: np.ndarray
    style: list[str]
    style_p: np.ndarray
    neither: np.ndarray

    def __len__(self) -> int:
        return len(self.thing)

    def shows(self, things: Sequence[str]) -> np.ndarray:
        """Return (n,) bool: whether picture i shows `things[i]` and is not "neither"."""
        return np.array([self.says(i, "thing", thing) for i, thing in self._numbered(things)], bool)

    def in_style(self, styles: Sequence[str]) -> np.ndarray:
        """Return (n,) bool: whether picture i is in style `styles[i]`."""
        return np.array([self.says(i, "style", style) for i, style in self._numbered(styles)], bool)

    def says(self, i: int, domain: str, name: str) -> bool:
        """Return whether picture i is read as this "thing" or "style"; a thing of a "neither" does not count."""
        return bool(getattr(self, domain)[i] == name and not (domain == "thing" and self.neither[i]))

    def _numbered(self, names: Sequence[str]) -> Iterator[tuple[int, str]]:
        """One name for each picture, with the picture's number."""
        return zip(range(len(self)), names, strict=True)


class Judge(Protocol):
    """Reads pictures. Any callable with these attributes is one."""

    name: str
    version: str
    threshold: float
    hash: str
    size: int
    things: tuple[str, ...]
    styles: tuple[str, ...]

    def __call__(self, images: np.ndarray) -> Readings:
        """Return the readings of uint8 RGB pictures (n, size, size, 3)."""


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
        x = self.stem(images * 2 - 1)
        texture = x
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth == 1:  # style lives in fine texture: its mean and spread early on, as in Gram-matrix style losses
                texture = torch.cat([x.mean((2, 3)), x.float().std((2, 3))], 1)
        deep = x.mean((2, 3))
        return self.thing_head(deep), self.style_head(torch.cat([texture, deep], 1))


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

    size = 64

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
        if images.ndim != 4 or images.shape[1:] != (64, 64, 3) or images.dtype != np.uint8:
            raise UserError(f"emoji-judge reads uint8 pictures (n, 64, 64, 3), not {images.dtype} {images.shape}")
        thing_p, style_p = [], []
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).float() / 255
            things, styles = self.network(pixels)
            thing_p.append(things.softmax(1))
            style_p.append(styles.softmax(1))
        if not thing_p:
            return Readings([], np.zeros(0), [], np.zeros(0), np.zeros(0, bool))
        best_thing, best_style = torch.cat(thing_p).max(1), torch.cat(style_p).max(1)
        sure = best_thing.values.numpy()
        return Readings(
            [self.things[i] for i in best_thing.indices.tolist()],
            sure,
            [self.styles[i] for i in best_style.indices.tolist()],
            best_style.values.numpy(),
            sure < self.threshold,
        )

    def halves(self, images: np.ndarray) -> tuple[Readings, Readings]:
        """Return the readings of the left and of the right half of two-thing scenes (n, 64, 64, 3)."""
        return self(half(images, 0)), self(half(images, 1))


def half(images: np.ndarray, side: int) -> np.ndarray:
    """Return the left (0) or right (1) half of each picture, mirrored out to the full width."""
    middle = images.shape[2] // 2
    part = images[:, :, :middle] if side == 0 else images[:, :, middle:]
    margin = middle // 2
    return np.pad(part, ((0, 0), (0, 0), (margin, margin), (0, 0)), mode="symmetric")


def load_judge(model: str | Path) -> EmojiJudge | None:
    """Return the judge that a model's `vocabulary.json` names beside it, or None if it names none."""
    vocabulary = Path(model) / "vocabulary.json"
    if not vocabulary.is_file():
        return None
    folder = json.loads(vocabulary.read_text()).get("judge")
    return EmojiJudge(Path(model) / folder) if folder else None
