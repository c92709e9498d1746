"""Pages: one or two drawings placed on a canvas, styled, and said in words.

Everything random comes from one `numpy` generator per page, so a page is a function of (seed, index).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from catalogue import HYPERNYMS, MEMBERS, PHRASINGS, STYLES, THINGS
from files import Refused, arrays, digest
from PIL import Image
from styles import RENDER

from esd.evaluation.prompts import say

SIDE = 128
PIXELS = 64
HELD_OUT_SHARE = 0.05
IMPLIED_SHARE = 0.2
"""Share of the captions with a thing in them that name one by a synonym or a hypernym."""
SYNONYM_SHARE = 0.7
"""Share of these that take a synonym."""


@dataclass(frozen=True)
class Page:
    """What is drawn: indices of one thing (or two, left then right) and of the style."""

    things: tuple[int, ...]
    style: int


class Drawings:
    """The rendered drawings, by designer and thing."""

    def __init__(self, archive: Path) -> None:
        stored = arrays(archive, "drawings.py", ("labels", "designers", "things", "others"))
        if list(stored["labels"]) != [t.label for t in THINGS]:
            raise Refused(f"{archive} shows other things than catalogue.py lists; run drawings.py again")
        self.designers = [str(name) for name in stored["designers"]]
        self.things = stored["things"]
        self.others = stored["others"]

    def digest(self) -> str:
        """Return the hash of all drawings."""
        return digest(np.ascontiguousarray(a).data for a in (self.things, self.others))

    def of(self, designer: str, thing: int) -> np.ndarray:
        """Return uint8 RGBA (128, 128, 4)."""
        return self.things[self.designers.index(designer), thing]


def held_out_pairs(seed: int = 11) -> frozenset[tuple[int, int]]:
    """Return the (thing, style) pairs that training never sees: 5% of all, spread evenly over the styles."""
    rng = np.random.default_rng(seed)
    total = round(HELD_OUT_SHARE * len(THINGS) * len(STYLES))
    order = rng.permutation(len(THINGS))
    return frozenset((int(order[i % len(THINGS)]), i % len(STYLES)) for i in range(total))


def paste(canvas: np.ndarray, drawing: np.ndarray, centre: tuple[float, float], side: int) -> None:
    """Lay a drawing, scaled to `side` pixels, over the canvas around `centre` (x, y); both RGBA, in place."""
    small = np.asarray(Image.fromarray(drawing).convert("RGBa").resize((side, side), Image.Resampling.BOX), np.float32)
    left, top = round(centre[0] - side / 2), round(centre[1] - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIDE), min(top + side, SIDE)
    part = small[y0 - top : y1 - top, x0 - left : x1 - left] / 255
    alpha = part[..., 3:]
    straight = part[..., :3] / np.maximum(alpha, 1e-4)
    region = canvas[y0:y1, x0:x1]
    region[..., :3] = np.where(alpha > 0.004, straight, region[..., :3])
    region[..., 3:] = np.maximum(region[..., 3:], alpha)


def draw(drawings: list[np.ndarray], style: int, rng: np.random.Generator) -> np.ndarray:
    """Return the styled page as uint8 RGB (64, 64, 3): one drawing large, or two side by side."""
    canvas = np.zeros((SIDE, SIDE, 4), np.float32)
    canvas[..., :3] = 1
    if len(drawings) == 1:
        side = int(rng.integers(108, 121))
        slack = (SIDE - side) / 2
        centre = (SIDE / 2 + rng.uniform(-slack, slack), SIDE / 2 + rng.uniform(-slack, slack))
        paste(canvas, drawings[0], centre, side)
    else:
        for half, drawing in enumerate(drawings):
            side = int(rng.integers(54, 64))
            x = SIDE * (0.25 + 0.5 * half) + rng.uniform(-1, 1) * (64 - side) / 2
            paste(canvas, drawing, (x, SIDE / 2 + rng.uniform(-16, 16)), side)
    styled = RENDER[STYLES[style]][0](canvas, rng)
    small = styled.reshape(PIXELS, 2, PIXELS, 2, 3).mean((1, 3))
    return (np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw_page(drawings: Drawings, page: Page, rng: np.random.Generator) -> np.ndarray:
    """Return a page's picture, uint8 RGB (64, 64, 3), by one designer drawn at random among its style's."""
    designers = RENDER[STYLES[page.style]][1]
    designer = designers[int(rng.integers(len(designers)))]
    return draw([drawings.of(designer, thing) for thing in page.things], page.style, rng)


def random_page(rng: np.random.Generator, *, scenes: float, unseen: frozenset[tuple[int, int]]) -> Page:
    """Return a page drawn uniformly over the pairs that are not in `unseen`; a share `scenes` has two things."""
    while True:
        style = int(rng.integers(len(STYLES)))
        count = 2 if rng.random() < scenes else 1
        things = tuple(int(t) for t in rng.choice(len(THINGS), count, replace=False))
        if not any((thing, style) in unseen for thing in things):
            return Page(things, style)


@dataclass(frozen=True)
class Caption:
    """Words, and what they are true of: the things that may stand in each place, and the style.

    `things` is None where no thing is named, `style` where no style is.
    """

    text: str
    things: tuple[frozenset[int], ...] | None = None
    style: int | None = None

    def fits(self, page: Page) -> bool:
        """Return whether the words are true of a page: "an animal" is true of every animal."""
        if self.style is not None and self.style != page.style:
            return False
        if self.things is None:
            return True
        if len(self.things) != len(page.things):
            return False
        return all(thing in allowed for allowed, thing in zip(self.things, page.things, strict=True))


def describe(page: Page, rng: np.random.Generator, *, kind: str | None = None, split: str = "train") -> Caption:
    """Return words for a page, with what they say.

    `kind` is "both", "thing", "style" or "empty" (by default drawn 70 : 15 : 5 : 10); a scene has its own
    phrasings. In training a share of the captions names one of its things by another word for it.
    """
    kind = kind or ("both", "thing", "style", "empty")[int(rng.choice(4, p=(0.70, 0.15, 0.05, 0.10)))]
    if kind == "empty":
        return Caption("")
    style = STYLES[page.style]
    if kind == "style":
        return Caption(say(_pick(PHRASINGS[split]["style"], rng), {"style": style}), style=page.style)
    slots = ("thing",) if len(page.things) == 1 else ("first", "second")
    slot = kind if len(slots) == 1 else {"both": "scene", "thing": "scene_thing"}[kind]
    phrasing = _pick(PHRASINGS[split][slot], rng)
    names, meant = [THINGS[thing].name for thing in page.things], [frozenset({thing}) for thing in page.things]
    if split == "train" and rng.random() < IMPLIED_SHARE:
        which = int(rng.integers(len(slots)))
        thing = THINGS[page.things[which]]
        if rng.random() < SYNONYM_SHARE:
            names[which] = _pick(thing.synonyms, rng)
        else:
            names[which], meant[which] = _pick(HYPERNYMS[thing.group], rng), MEMBERS[thing.group]
            phrasing = without_article(phrasing, slots[which])
    text = say(phrasing, {"style": style, **dict(zip(slots, names, strict=True))})
    return Caption(text, tuple(meant), page.style if kind == "both" else None)


def caption(page: Page, rng: np.random.Generator, *, kind: str | None = None, split: str = "train") -> str:
    """Return words for a page; see `describe`."""
    return describe(page, rng, kind=kind, split=split).text


def without_article(phrasing: str, slot: str) -> str:
    """Return a phrasing for words that bring their own article, such as hypernyms.

    >>> without_article("a {thing} in the {style} style", "thing"), without_article("{style} {thing}", "thing")
    ('{thing} in the {style} style', '{thing}, {style} style')
    """
    if phrasing == f"{{style}} {{{slot}}}":  # "neon a plant" is no English, and the style cannot go inside
        return f"{{{slot}}}, {{style}} style"
    return phrasing.replace(f"a {{{slot}}}", f"{{{slot}}}")


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
