"""Pictures to look at: base and erased side by side, in labelled rows and columns.

Drawn with Pillow and its built-in font, so a preview needs no display, no plotting library and no system
fonts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from esd.storage import atomic

CELL = 112  # smallest edge of a drawn image, pixels
GAP, PAIR_GAP, MARGIN = 18, 3, 20
INK, FAINT, PAPER = (25, 25, 25), (115, 115, 115), (255, 255, 255)
ROLE_INK = {"target": (176, 32, 32), "neighbour": (28, 92, 160), "unrelated": (60, 120, 50)}


@dataclass(frozen=True)
class Row:
    """One row of a picture.

    Attributes:
        label: what the row shows.
        role: "target", "neighbour", "unrelated", or "" for none.
        images: uint8 (columns, versions, H, W, 3); versions stand side by side, base first.
    """

    label: str
    role: str
    images: np.ndarray


def draw(
    path: Path,
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    title: str,
    versions: Sequence[str] = ("base", "erased"),
) -> None:
    """Writes a PNG of the rows to `path`, atomically.

    Args:
        path: of the picture.
        rows: at least one, with as many images; those of another size are fitted into the first row's.
        columns: a label for each column.
        title: one line above everything.
        versions: a label for each image of a cell.
    """
    fonts = {size: ImageFont.load_default(size) for size in (13, 15, 20)}
    height, width = rows[0].images.shape[2:4]
    scale = max(1, -(-CELL // min(height, width)))
    height, width = height * scale, width * scale
    if min(height, width) > 3 * CELL:  # images of real models: a page stays a page
        height, width = height * 256 // width, 256
    cell = len(versions) * width + (len(versions) - 1) * PAIR_GAP
    texts = [text for row in rows for text in (row.label, row.role)]
    left = MARGIN + 14 + min(320, max(int(fonts[15].getlength(text)) for text in texts))
    top = MARGIN + 74
    page = Image.new(
        "RGB",
        (left + len(columns) * (cell + GAP) + MARGIN - GAP, top + len(rows) * (height + GAP) + MARGIN - GAP),
        PAPER,
    )
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN - 4), title, fill=INK, font=fonts[20])
    for column, label in enumerate(columns):
        x = left + column * (cell + GAP)
        pen.text((x, top - 40), _fitted(label, fonts[15], cell), fill=INK, font=fonts[15])
        for number, version in enumerate(versions):
            pen.text((x + number * (width + PAIR_GAP), top - 20), version, fill=FAINT, font=fonts[13])
    for line, row in enumerate(rows):
        y = top + line * (height + GAP)
        pen.text(
            (MARGIN, y + height // 2 - 20),
            _fitted(row.label, fonts[15], left - MARGIN - 8),
            fill=INK,
            font=fonts[15],
        )
        pen.text((MARGIN, y + height // 2), row.role, fill=ROLE_INK.get(row.role, FAINT), font=fonts[13])
        for column, pair in enumerate(row.images):
            for number, image in enumerate(pair):
                where = (left + column * (cell + GAP) + number * (width + PAIR_GAP), y)
                fitted = ImageOps.pad(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS, color=PAPER)
                page.paste(fitted, where)
    with atomic(path) as staged:
        page.save(staged, format="PNG", optimize=True)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
