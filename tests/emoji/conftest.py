"""The recipe's scripts on the path, and a handful of made-up drawings to run every stage on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "emoji"
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawings of coloured discs and a pool of 24 pages drawn from them, and nothing else."""
    from catalogue import STYLES, THINGS
    from drawings import PACKAGES
    from pages import Drawings, Page, draw_page
    from pool import Pool

    folder = tmp_path_factory.mktemp("emoji")
    y, x = np.mgrid[:128, :128]
    rng = np.random.default_rng(0)

    def disc() -> np.ndarray:
        drawing = np.zeros((128, 128, 4), np.uint8)
        inside = (x - rng.integers(40, 88)) ** 2 + (y - rng.integers(40, 88)) ** 2 < rng.integers(400, 1600)
        drawing[inside, :3], drawing[inside, 3] = rng.integers(0, 255, 3), 255
        return drawing

    few = [disc() for _ in range(8)]
    things = np.stack([np.stack([few[(i + d) % 7] for i in range(len(THINGS))]) for d in range(len(PACKAGES))])
    told = {"labels": [t.label for t in THINGS], "designers": list(PACKAGES)}
    np.savez(folder / "drawings.npz", things=things, others=np.stack(few * 2), **told)
    drawings = Drawings(folder / "drawings.npz")
    pages = [Page((i,), i % len(STYLES)) for i in range(20)] + [Page((i, i + 1), i) for i in range(4)]
    images = np.stack([draw_page(drawings, page, np.random.default_rng(i)) for i, page in enumerate(pages)])
    columns = np.array([(*(*p.things, -1)[:2], p.style) for p in pages], np.int16)
    Pool(images, columns[:, 0], columns[:, 1], columns[:, 2], drawings.digest()).save(folder / "pool.npz")
    return folder


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Path:
    """A data folder of the test's own, with drawings and pool."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Take a small UNet, looked at through two pictures, and a judge that learns little and sits a short exam."""
    import train_judge
    import train_unet
    from diffusers import UNet2DConditionModel

    unet = partial(
        UNet2DConditionModel,
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=128,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2,
    )
    patch.setattr(train_unet, "new_unet", unet)
    patch.setattr(train_unet, "read", partial(train_unet.read, count=2))
    patch.setattr(train_judge, "exam", partial(train_judge.exam, count=12))
    patch.setattr(train_judge, "held_out_pairs", lambda: frozenset({(0, 1)}))
    patch.setattr(train_judge, "SCENES", 4)
    patch.setattr(train_judge, "OUTSIDERS", 32)
    patch.setattr(train_judge, "NEEDED", {"thing": 0.0, "style": 0.0})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every stage a matter of seconds."""
    make_small(monkeypatch)


@pytest.fixture(scope="session")
def trained(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data folder in which make.py ran every stage after the pool, and the models it published; look, don't touch."""
    import make

    root = tmp_path_factory.mktemp("trained")
    data, models = Path(shutil.copytree(drawn, root / "data")), root / "checkpoints"
    for name in ("emoji-sd", "emoji-clip", "emoji-judge"):
        (models / name).mkdir(parents=True)
        (models / name / "README.md").write_text(f"the card of {name}\n")
    options = {**SMALL, "publish": ("--out", str(models))}
    ran = []

    def in_this_process(command: list[str]) -> int:
        ran.append(Path(command[1]).stem)
        run(patch, ran[-1], *command[2:], *options[ran[-1]])
        return 0

    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(make, "run", in_this_process)
        run(patch, "make", "--data", str(data))
    assert ran == ["train_clip", "train_vae", "train_judge", "train_unet", "train_clip", "publish"]
    return data, models


SMALL = {
    "train_clip": ("--steps", "2", "--batch", "8", "--device", "cpu"),
    "train_vae": ("--steps", "2", "--batch", "4", "--device", "cpu"),
    "train_judge": ("--steps", "1", "--batch", "12", "--device", "cpu"),
    "train_unet": ("--steps", "2", "--batch", "4", "--device", "cpu"),
}
"""What makes each stage a matter of seconds."""


def run(patch: pytest.MonkeyPatch, module: str, *arguments: str) -> None:
    """Run a stage's main() with a command line."""
    patch.setattr(sys, "argv", [module, *arguments])
    __import__(module).main()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what runs a small stage in a data folder: stage("train_vae", data, "--steps", "3")."""

    def call(module: str, data: Path, *arguments: str) -> None:
        run(monkeypatch, module, "--data", str(data), *SMALL.get(module, ()), *arguments)

    return call
