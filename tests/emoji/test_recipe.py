"""Every stage of the recipe, for a step or two on a handful of drawings, and the loop they share."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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


SMALL = {
    "train_clip": ("--steps", "2", "--batch", "8", "--device", "cpu"),
    "train_vae": ("--steps", "2", "--batch", "4", "--device", "cpu"),
    "train_judge": ("--steps", "1", "--batch", "12"),
    "train_unet": ("--steps", "2", "--batch", "4", "--device", "cpu"),
}
"""What makes each stage a matter of seconds."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small UNet, looked at through two pictures, and a judge that learns little and sits a short exam."""
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
    monkeypatch.setattr(train_unet, "new_unet", unet)
    monkeypatch.setattr(train_unet, "read", partial(train_unet.read, count=2))
    monkeypatch.setattr(train_judge, "exam", partial(train_judge.exam, count=12))
    monkeypatch.setattr(train_judge, "held_out_pairs", lambda: frozenset({(0, 1)}))
    monkeypatch.setattr(train_judge, "SCENES", 4)
    monkeypatch.setattr(train_judge, "OUTSIDERS", 8)


def test_every_stage_runs_in_order_and_publishes_what_stock_diffusers_loads(
    data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import make
    import train_judge
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(train_judge, "NEEDED", {"thing": 0.0, "style": 0.0})
    options = {**SMALL, "publish": ("--out", str(tmp_path))}
    ran = []

    def in_this_process(command: list[str]) -> SimpleNamespace:
        ran.append(Path(command[1]).stem)
        run(monkeypatch, ran[-1], *command[2:], *options[ran[-1]])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(make, "subprocess", SimpleNamespace(run=in_this_process))
    run(monkeypatch, "make", "--data", str(data), "--from", "clip")
    assert ran == ["train_clip", "train_vae", "train_judge", "train_unet", "train_clip", "publish"]

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "emoji-sd")
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    words = json.loads((tmp_path / "emoji-sd" / "vocabulary.json").read_text())
    assert words["things"][0]["name"] == "cat" and len(words["held_out_pairs"]) > 0
    assert_clip_reads_as(pipe.text_encoder, tmp_path / "emoji-clip")

    start = ("--start", str(tmp_path / "emoji-sd"))
    run(monkeypatch, "train_unet", "--data", str(data), *SMALL["train_unet"], *start, "--steps", "3")

    measured = ("--model", str(tmp_path / "emoji-sd"), "--sheets", str(tmp_path), "--device", "cpu")
    run(monkeypatch, "quality", *measured, "--steps", "1", "--every", "101", "--scenes", "10")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told) == {"thing", "style", "unseen_pairs", "implied", "scenes", "n"}
    assert (tmp_path / "scenes.png").exists()


def assert_clip_reads_as(text: torch.nn.Module, folder: Path) -> None:
    """CLIP's text tower, half precision, is the pipeline's: it was locked while the rest learned."""
    from transformers import CLIPModel

    tower = CLIPModel.from_pretrained(folder).text_model.state_dict()
    assert all(torch.equal(tower[name].half(), value.half()) for name, value in text.state_dict().items())


def test_make_stops_at_a_stage_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import make

    monkeypatch.setattr(make, "subprocess", SimpleNamespace(run=lambda command: SimpleNamespace(returncode=3)))
    with pytest.raises(SystemExit, match=r"vae stopped with status 3; .* --from vae"):
        run(monkeypatch, "make", "--data", str(tmp_path), "--from", "vae")


def test_a_judge_that_is_not_good_enough_is_not_published(
    data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_judge

    for name in ("drawings.npz", "pool.npz"):
        shutil.copy(data / name, tmp_path)
    monkeypatch.setattr(train_judge, "round_trip", lambda vae, images: images)
    no_vae = SimpleNamespace(from_pretrained=lambda folder: torch.nn.Identity())
    monkeypatch.setattr(train_judge, "AutoencoderKL", no_vae)
    with pytest.raises(SystemExit, match="it may not judge"):
        run(monkeypatch, "train_judge", "--data", str(tmp_path), *SMALL["train_judge"])
    assert not (tmp_path / "judge").exists()


def test_the_sheets_show_every_thing_and_the_pairs_never_trained(tmp_path: Path) -> None:
    import quality
    from catalogue import STYLES, THINGS
    from PIL import Image

    cells = quality.grid()
    quality.grid_sheets(tmp_path, cells, np.zeros((len(cells), 64, 64, 3), np.uint8))
    sheets = [f"things-{part}.png" for part in range(1, -(-len(THINGS) // 36) + 1)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*sheets, "unseen-pairs.png"]
    with Image.open(tmp_path / "things-1.png") as first:
        assert first.size == (84 + 64 * len(STYLES), 16 + 64 * 36)


def test_the_pool_shows_every_trained_pair_and_scenes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pool
    from catalogue import STYLES, THINGS
    from pages import Page, held_out_pairs

    monkeypatch.setattr(pool, "THINGS", THINGS[:2])
    shutil.copy(data / "drawings.npz", tmp_path)
    run(monkeypatch, "pool", "--data", str(tmp_path), "--variants", "1", "--scenes", "2")
    drawn = pool.Pool.load(tmp_path / "pool.npz")
    trained = [Page((t,), s) for t in range(2) for s in range(len(STYLES)) if (t, s) not in held_out_pairs()]
    pages = [drawn.page(i) for i in range(len(drawn))]
    assert pages[:-2] == trained and all(len(page.things) == 2 for page in pages[-2:])
    assert drawn.images.shape == (len(pages), 64, 64, 3)


def test_drawings_hold_every_thing_by_every_designer_and_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py", reason="the recipe needs the `emoji` extra")
    import drawings
    from catalogue import THINGS

    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2"><rect width="4" height="2" fill="red"/></svg>'
    icons = {drawings.slug(label): svg for label in [*(t.label for t in THINGS), "abacus", "yo-yo"]}
    monkeypatch.setattr(drawings, "fetch", lambda designer, folder: icons)
    run(monkeypatch, "drawings", "--data", str(tmp_path))
    with np.load(tmp_path / "drawings.npz") as stored:
        assert stored["things"].shape == (len(drawings.PACKAGES), len(THINGS), 128, 128, 4)
        assert len(stored["others"]) == 4  # two things outside the list by two designers
        assert stored["things"][0, 0, 64, 64].tolist() == [255, 0, 0, 255]
        assert stored["things"][0, 0, 0, 0, 3] == 0  # a wide drawing sits in the middle of its square
