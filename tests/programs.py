"""Runs a program of esd inside the test's process, as its command line would: torch takes seconds to load."""

import csv
import json
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from esd import checkpoint
from esd.config.analyze import AnalyzeConfig
from esd.config.evaluate import EvaluateConfig
from esd.config.generate import GenerateConfig
from esd.config.paths import conf_dir
from esd.config.train import TrainConfig
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


# Pictures of a second by the same, to which prompts are added.
DRAW = ("model.path=base", "num_steps=2", "device=cpu")
SCHEMAS = {"train": TrainConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig}
BUNDLED = Path(__file__).parents[1] / "checkpoints"


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
    model = folder / "base-known"
    shutil.copytree(folder / "base", model)
    config = json.loads((model / "unet/config.json").read_text())
    (model / "unet/config.json").write_text(json.dumps(config | {"sample_size": 32}))
    shutil.copy(BUNDLED / "emoji-sd/vocabulary.json", model)
    (folder / "emoji-judge").symlink_to(BUNDLED / "emoji-judge")
    return model


def models(folder: Path) -> Path:
    """Saves the tiny pipelines `base` and `other`, which differ in their weights only."""
    tiny.pipeline().save_pretrained(folder / "base")
    tiny.pipeline(seed=1).save_pretrained(folder / "other")
    return folder


def erased_weights(path: Path, seed: int = 0) -> Path:
    """A checkpoint that changes the tiny base of that seed visibly."""
    unet = tiny.pipeline(seed=seed).unet
    base = {name: value for name, value in unet.named_parameters() if "conv_in" in name}
    differences = {name: torch.full_like(value, 0.5) for name, value in base.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(
        path, differences, {"fingerprint": checkpoint.fingerprint(base), "concepts": ["cat"], "base": "base"}
    )
    return path


def train(command: Command, *arguments: str) -> Ended:
    """A run of esd.train that erases the cat from `base`, into runs/cat."""
    return command("train", "concepts=[cat]", "run_dir=runs/cat", *FAST, *arguments)


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def composed(name: str, overrides: list[str]) -> TrainConfig | GenerateConfig | EvaluateConfig | AnalyzeConfig:
    """The configuration of a program under these settings, composed as Hydra does."""
    ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name])
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return OmegaConf.to_object(compose(config_name=name, overrides=overrides))
