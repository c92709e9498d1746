"""The front page's promise, kept on the bundled model: one command, and the concept is gone while the rest stands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import esd
from tests.programs import BUNDLED, Command

MODEL = BUNDLED / "emoji-sd"
FEWER = [
    f"evaluation.{kind}_images={n}" for kind, n in (("target", 60), ("retained", 120), ("implied", 30), ("preview", 4))
]

pytestmark = pytest.mark.slow(reason="erases from the bundled model and reads hundreds of its pictures")


@pytest.mark.parametrize(("experiment", "concept"), [("erase_thing", "cat"), ("erase_style", "mosaic")])
def test_a_concept_goes_and_the_rest_stays(
    experiment: str, concept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command, run = Command(monkeypatch, capsys, tmp_path), tmp_path / "run"
    settings = (f"experiment={experiment}", f"concepts=[{concept}]", f"model.path={MODEL}", f"run_dir={run}", *FEWER)
    ended = command("train", *settings, "device=cpu")
    assert ended.code == 0, ended.err
    rates = json.loads((run / "summary.json").read_text())
    target, same, cross = (rates[name] for name in ("target", "same_domain", "cross_domain"))
    assert target["before"] >= 0.8 and target["after"] <= 0.05
    kept = rates["target_style" if experiment == "erase_thing" else "target_thing"]
    assert kept["after"] >= 0.7 * kept["before"]
    assert rates["neither"] is not None and rates["seconds"] > 0
    assert same["after"] >= 0.85 * same["before"] and cross["after"] >= 0.9 * cross["before"]

    official = tmp_path / "official.safetensors"
    ended = command("files", "export", str(run), "--format", "official", "--out", str(official))
    assert ended.code == 0, ended.err
    assert np.array_equal(drawn_with(official), drawn_under(run))


def drawn_with(official: Path) -> np.ndarray:
    """A picture (64, 64, 3) that stock diffusers draws from an export in the original scripts' form."""
    from safetensors.torch import load_file

    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    found = pipe.unet.load_state_dict(load_file(official), strict=False)
    assert not found.unexpected_keys
    return drawn(pipe)


def drawn_under(run: Path) -> np.ndarray:
    """The same picture by the run's own checkpoint, which leaves the base as it was."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    base = drawn(pipe)
    with esd.erased(pipe, run):
        picture = drawn(pipe)
    assert np.array_equal(drawn(pipe), base) and not np.array_equal(picture, base)
    return picture


def drawn(pipe: StableDiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return np.asarray(pipe("a cat in the mosaic style", **options).images[0])
