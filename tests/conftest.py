"""Shared tiny models, for reading only: a test that changes weights builds its own with `tiny.pipeline()`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from esd.families import Family, family_of
from tests import tiny
from tests.programs import Command, models


def pytest_configure(config: pytest.Config) -> None:
    """diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 frowns upon."""
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning:diffusers")
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # side by side each gets its share of the cores
        share = max(1, (os.cpu_count() or 1) // int(workers))
        torch.set_num_threads(share)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))  # of the programs that tests start


@pytest.fixture(scope="session")
def tiny_pipe() -> Any:
    """The small ε-predicting pipeline."""
    return tiny.pipeline()


@pytest.fixture(scope="session")
def tiny_family(tiny_pipe: Any) -> Family:
    return family_of(tiny_pipe)


@pytest.fixture(scope="session")
def tiny_v_family() -> Family:
    """The larger, v-predicting one."""
    return family_of(tiny.pipeline("v_prediction", "large", seed=1))


@pytest.fixture(scope="session", params=["epsilon-small", "v_prediction-large"])
def any_family(request: pytest.FixtureRequest) -> Family:
    """Both of them in turn."""
    return request.getfixturevalue("tiny_family" if request.param == "epsilon-small" else "tiny_v_family")


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small pipeline as a directory on disk."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines `base` and `other`, which differ in their weights only."""
    return models(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def command(saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Command:
    """Runs programs of esd in an empty folder from which `base` and `other` can be seen."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        (tmp_path / name).symlink_to(saved_models / name)
    return Command(monkeypatch, capsys, tmp_path)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, in a folder."""
    return tiny.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet of three labels with random weights, in a folder."""
    return tiny.save_resnet(tmp_path_factory.mktemp("resnet"))
