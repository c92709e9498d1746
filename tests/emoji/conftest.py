"""The recipe's scripts on the path, and a handful of made-up drawings to run every stage on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "emoji"
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with drawings of coloured discs and a pool of 24 pages drawn from them."""
    pytest.importorskip("scipy", reason="the recipe needs the `emoji` extra")
    from catalogue import STYLES, THINGS
    from drawings import PACKAGES
    from pages import Drawings, Page, draw_page

    folder = tmp_path_factory.mktemp("emoji")
    y, x = np.mgrid[:128, :128]
    rng = np.random.default_rng(0)

    def disc() -> np.ndarray:
        drawing = np.zeros((128, 128, 4), np.uint8)
        inside = (x - rng.integers(40, 88)) ** 2 + (y - rng.integers(40, 88)) ** 2 < rng.integers(400, 1600)
        drawing[inside, :3], drawing[inside, 3] = rng.integers(0, 255, 3), 255
        return drawing

    few = [disc() for _ in range(7)]
    things = np.stack([np.stack([few[(i + d) % 7] for i in range(len(THINGS))]) for d in range(len(PACKAGES))])
    np.savez(folder / "drawings.npz", things=things, others=np.stack(few * 2), designers=np.array(list(PACKAGES)))
    drawings = Drawings(folder / "drawings.npz")
    pages = [Page((i,), i % len(STYLES)) for i in range(20)] + [Page((i, i + 1), i) for i in range(4)]
    images = np.stack([draw_page(drawings, page, np.random.default_rng(i)) for i, page in enumerate(pages)])
    columns = np.array([(*(*p.things, -1)[:2], p.style) for p in pages], np.int16)
    np.savez(folder / "pool.npz", images=images, first=columns[:, 0], second=columns[:, 1], style=columns[:, 2])
    return folder
