"""Runs a program of esd inside the test's process as its command line would: torch takes seconds to load."""

import json
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from tests import tiny

# A training run of a second on a tiny model.
FAST = (
    "model.path=base",
    "training.updates=4",
    "training.batch_size=3",
    "trajectory.num_steps=3",
    "trajectory.rollouts=3",
    "evaluation.num_steps=2",
    "evaluation.preview_images=2",
    "device=cpu",
)


@dataclass
class Ended:
    """How a program ended: exit code, what it printed, what it complained about."""

    code: int
    out: str
    err: str


@dataclass
class Command:
    """Calls programs in a folder of their own, in which `base` and `other` are tiny pipelines."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    folder: Path

    def __call__(self, program: str, *arguments: str) -> Ended:
        self.monkeypatch.setattr(sys, "argv", [f"{program}.py", *arguments])
        self.capsys.readouterr()
        code = 0
        try:
            import_module(f"esd.{program}").main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        printed = self.capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    def files(self) -> set[str]:
        """Every file and folder there is now, but the models."""
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return {name for name in found if not name.startswith(("base", "other"))}


def known_model(folder: Path) -> Path:
    """A tiny model that knows the bundled model's words and draws pictures of its judge's size; the judge beside it.

    Args:
        folder: of a `Command`, in which the model is made.
    """
    bundled, model = Path(__file__).parents[1] / "checkpoints", folder / "base-known"
    shutil.copytree(folder / "base", model)
    config = json.loads((model / "unet/config.json").read_text())
    (model / "unet/config.json").write_text(json.dumps(config | {"sample_size": 32}))
    shutil.copy(bundled / "emoji-sd/vocabulary.json", model)
    (folder / "emoji-judge").symlink_to(bundled / "emoji-judge")
    return model


def models(folder: Path) -> Path:
    """Saves the tiny pipelines `base` and `other`, which differ in their weights only."""
    tiny.pipeline().save_pretrained(folder / "base")
    tiny.pipeline(seed=1).save_pretrained(folder / "other")
    return folder
