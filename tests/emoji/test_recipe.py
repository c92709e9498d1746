"""Every stage of the recipe, for two steps on a handful of drawings, and the loop they share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="the recipe needs the `emoji` extra")


def run(monkeypatch: pytest.MonkeyPatch, module: str, *arguments: str) -> None:
    """Run a stage's main() with a command line."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    __import__(module).main()


def train(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Train a linear map for `steps`, in `folder`, and return its averaged weights."""
    from training import Recipe, Stage

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    stage = Stage(
        "toy", model, Recipe(steps=4 if steps > 2 else steps, batch=2, lr=0.1, warmup=1, save_every=2), folder
    )

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        return model(torch.from_numpy(rng.normal(size=(2, 4))).float()).pow(2).sum()

    stage.run(loss_of)
    return {**stage.average, **{f"raw.{k}": v for k, v in model.state_dict().items()}}


def test_four_steps_equal_two_and_resume_and_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training

    monkeypatch.setattr(training, "learning_rate", lambda recipe, step: recipe.lr)
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path) -> None:
    from training import Recipe, Stage

    model = torch.nn.Linear(1, 1)
    stage = Stage("toy", model, Recipe(steps=3, batch=1, lr=0.1), tmp_path)
    with pytest.raises(SystemExit, match="lower --lr"):
        stage.run(lambda rng: model(torch.full((1, 1), float("inf"))).sum())


def test_every_stage_runs_in_order_and_publishes_what_stock_diffusers_loads(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_unet
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    def small_unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=128,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=2,
        )

    monkeypatch.setattr(train_unet, "new_unet", small_unet)
    where = ("--data", str(data))
    run(monkeypatch, "train_vae", *where, "--steps", "2", "--batch", "4")
    run(monkeypatch, "train_clip", *where, "--steps", "2", "--batch", "8")
    run(monkeypatch, "train_unet", *where, "--steps", "2", "--batch", "4", "--device", "cpu")
    write_untrained_judge(data / "judge")
    from publish import publish

    publish(data, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "emoji-sd")
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    words = json.loads((tmp_path / "emoji-sd" / "vocabulary.json").read_text())
    assert words["things"][0]["name"] == "cat" and len(words["held_out_pairs"]) > 0

    run(
        monkeypatch,
        "train_unet",
        *where,
        "--start",
        str(tmp_path / "emoji-sd"),
        "--steps",
        "3",
        "--batch",
        "4",
        "--device",
        "cpu",
    )


def write_untrained_judge(folder: Path) -> None:
    """A judge of random weights, in the published format."""
    import hashlib

    from catalogue import STYLES, THINGS
    from safetensors.torch import save_file

    from esd.evaluation.judges import JudgeNetwork

    folder.mkdir()
    save_file(JudgeNetwork(len(THINGS), len(STYLES)).state_dict(), folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    told = {
        "version": "0",
        "threshold": 0.5,
        "sha256": digest,
        "things": [t.name for t in THINGS],
        "styles": list(STYLES),
    }
    (folder / "config.json").write_text(json.dumps(told))


def test_a_judge_that_is_not_good_enough_is_not_published(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_judge

    full = train_judge.exam
    monkeypatch.setattr(train_judge, "exam", lambda drawings, vae, seed: full(drawings, vae, seed, count=12))
    monkeypatch.setattr(train_judge, "round_trip", lambda vae, images: images)
    monkeypatch.setattr(
        train_judge,
        "AutoencoderKL",
        type("NoVae", (), {"from_pretrained": staticmethod(lambda _: torch.nn.Identity())}),
    )
    monkeypatch.setattr(train_judge, "SCENES", 4)
    monkeypatch.setattr(train_judge, "OUTSIDERS", 8)
    with pytest.raises(SystemExit, match="it may not judge"):
        run(monkeypatch, "train_judge", "--data", str(data), "--steps", "1", "--batch", "12")
    assert not (data / "judge" / "config.json").exists() or "exam" not in json.loads(
        (data / "judge" / "config.json").read_text()
    )
