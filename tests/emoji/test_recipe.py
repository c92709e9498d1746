"""Every stage of the recipe, for a step or two on a handful of drawings, and what they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow(reason="trains every stage of the recipe, some of them several times")

Run = Callable[..., None]
Trained = tuple[Path, Path]


def test_what_is_published_is_what_stock_diffusers_loads(trained: Trained) -> None:
    from diffusers import StableDiffusionPipeline

    _, models = trained
    pipe = StableDiffusionPipeline.from_pretrained(models / "emoji-sd")
    assert {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    words = json.loads((models / "emoji-sd" / "vocabulary.json").read_text())
    assert words["things"][0]["name"] == "cat" and len(words["held_out_pairs"]) > 0
    assert (models / "emoji-sd" / "README.md").read_text() == "the card of emoji-sd\n"
    assert sorted(folder.name for folder in models.iterdir()) == ["emoji-clip", "emoji-judge", "emoji-sd"]


def test_the_tokenizers_have_the_slow_tokenizers_files_and_know_the_same_words(trained: Trained) -> None:
    from transformers import CLIPTokenizer

    data, models = trained
    for folder in (data / "tokenizer", models / "emoji-sd" / "tokenizer", models / "emoji-clip"):
        assert json.loads((folder / "vocab.json").read_text()) == CLIPTokenizer.from_pretrained(folder).get_vocab()
        assert (folder / "merges.txt").read_text() == (data / "tokenizer" / "merges.txt").read_text()


def test_every_run_is_told_with_the_published_model(trained: Trained) -> None:
    _, models = trained
    told = json.loads((models / "emoji-sd" / "training.json").read_text())
    assert set(told) == {"clip", "vae", "judge", "unet", "clip-locked"}
    (first,) = told["unet"]
    assert (first["from"], first["to"]) == (0, 2)
    assert first["recipe"]["batch"] == 4 and first["arguments"] == {"scenes": 0.4}
    assert set(first["made_from"]) == {"pool", "vae", "tokenizer"}
    assert told["vae"][0]["made_from"]["pool"] == first["made_from"]["pool"]
    assert told["clip-locked"][0]["arguments"]["text"] == "text"


def test_clip_reads_words_as_the_unet_does(trained: Trained) -> None:
    from publish import towers
    from train_clip import tower

    clip, text = (tower(part) for part in towers(trained[0]))
    assert clip.keys() == text.keys() and all(torch.equal(clip[name], text[name]) for name in clip)


def test_a_tower_that_is_given_wins_over_an_older_state(trained: Trained, data: Path, stage: Run) -> None:
    from publish import towers
    from train_clip import tower
    from transformers import CLIPTextModel

    shutil.rmtree(data)
    shutil.copytree(trained[0], data)
    text = CLIPTextModel.from_pretrained(data / "text")
    with torch.no_grad():
        next(text.parameters()).add_(1)
    text.save_pretrained(data / "text")
    with pytest.raises(SystemExit, match=r"text changed since .* --changed"):
        stage("train_clip", data, "--text", str(data / "text"), "--steps", "3")
    with pytest.raises(SystemExit, match=r"all 2 steps were taken before text changed; ask for more --steps than 2"):
        stage("train_clip", data, "--text", str(data / "text"), "--changed")
    stage("train_clip", data, "--text", str(data / "text"), "--steps", "3", "--changed")
    clip, given = (tower(part) for part in towers(data))
    assert all(torch.equal(clip[name], given[name]) for name in given)


def test_publishing_refuses_a_clip_with_another_tower_and_a_missing_card(
    trained: Trained, data: Path, tmp_path: Path, stage: Run
) -> None:
    from transformers import CLIPTextModel

    shutil.rmtree(data)
    shutil.copytree(trained[0], data)
    models = Path(shutil.copytree(trained[1], tmp_path / "checkpoints"))
    text = CLIPTextModel.from_pretrained(data / "text")
    with torch.no_grad():
        next(text.parameters()).add_(1)
    text.save_pretrained(data / "text")
    with pytest.raises(SystemExit, match=r"text tower of .* is not .*run train_clip.py --text"):
        stage("publish", data, "--out", str(models))
    shutil.rmtree(data / "text")
    shutil.copytree(trained[0] / "text", data / "text")
    shutil.rmtree(data / "vae")
    shutil.copytree(trained[0] / "judge", data / "vae")
    with pytest.raises(SystemExit, match=r"judge was trained on another vae than .*vae; train it on this one"):
        stage("publish", data, "--out", str(models))
    (models / "emoji-clip" / "README.md").unlink()
    with pytest.raises(SystemExit, match=r"emoji-clip/README.md is missing"):
        stage("publish", data, "--out", str(models))
    shutil.rmtree(data / "judge")
    with pytest.raises(SystemExit, match=r"there is no judge .* run train_judge.py first"):
        stage("publish", data, "--out", str(models))
    assert (models / "emoji-judge" / "config.json").exists() and not (models / "part.publish").exists()


def test_publishing_that_fails_leaves_what_was_published(
    trained: Trained, tmp_path: Path, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import publish

    data, models = trained[0], Path(shutil.copytree(trained[1], tmp_path / "checkpoints"))
    before = {file: file.stat().st_mtime_ns for file in models.rglob("*")}
    monkeypatch.setattr(publish, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="1,000 are allowed"):
        stage("publish", data, "--out", str(models))
    assert before == {file: file.stat().st_mtime_ns for file in models.rglob("*")}
    assert not (models / "part.publish").exists()


def test_published_weights_drawings_and_pool_are_enough_to_go_on(
    trained: Trained, data: Path, small: None, stage: Run
) -> None:
    from diffusers import UNet2DConditionModel
    from train_clip import tower
    from transformers import CLIPTextModel

    start = ("--start", str(trained[1] / "emoji-sd"))
    assert sorted(file.name for file in data.iterdir()) == ["drawings.npz", "pool.npz"]
    stage("train_unet", data, *start, "--steps", "0")
    unet, text = UNet2DConditionModel.from_pretrained(data / "unet"), CLIPTextModel.from_pretrained(data / "text")
    told = UNet2DConditionModel.from_pretrained(trained[1] / "emoji-sd", subfolder="unet").state_dict()
    assert all(torch.equal(told[name].float(), value.float()) for name, value in unet.state_dict().items())
    told = tower(CLIPTextModel.from_pretrained(trained[1] / "emoji-sd", subfolder="text_encoder"))
    assert all(torch.equal(told[name], value) for name, value in tower(text).items())
    assert (data / "vae" / "training.json").read_text() == (trained[0] / "vae" / "training.json").read_text()

    stage("train_unet", data, *start, "--steps", "1")
    with pytest.raises(SystemExit, match=r"unet.state.safetensors exists; remove it .* or leave --start out"):
        stage("train_unet", data, *start)
    stage("train_unet", data, "--steps", "2")
    from training import history

    runs = [(run["from"], run["to"], run["arguments"].get("start")) for run in history(data / "unet", "unet")]
    assert history(data / "unet", "clip") == history(trained[0] / "unet", "clip") != []
    assert runs == [(0, 2, None), (0, 1, "emoji-sd"), (1, 2, None)]  # the first is the published one's


@pytest.mark.parametrize("module", ["train_vae", "train_clip", "train_judge"])
def test_other_stages_begin_from_published_weights_too(
    trained: Trained, data: Path, small: None, stage: Run, module: str
) -> None:
    stage(module, data, "--start", str(trained[1] / "emoji-sd"), "--steps", "0")
    name = module.removeprefix("train_")
    published = {"vae": "emoji-sd/vae", "clip": "emoji-clip", "judge": "emoji-judge"}[name]
    theirs, ours = (
        {k: v.float() for file in folder.glob("*.safetensors") for k, v in torch_load(file).items()}
        for folder in (trained[1] / published, data / name)
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)


def torch_load(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_start_that_is_no_pipeline_or_goes_with_another_autoencoder_is_refused(
    trained: Trained, data: Path, small: None, stage: Run
) -> None:
    with pytest.raises(SystemExit, match=r"nowhere lacks unet, text_encoder, vae, tokenizer.*checkpoints/emoji-sd"):
        stage("train_unet", data, "--start", "nowhere")
    shutil.copytree(trained[0] / "judge", data / "vae")
    with pytest.raises(SystemExit, match=r"vae is not the vae that .* was trained with"):
        stage("train_unet", data, "--start", str(trained[1] / "emoji-sd"))


def test_a_stage_that_is_finished_leaves_what_it_made(
    trained: Trained, data: Path, small: None, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_judge
    import train_unet

    shutil.rmtree(data)
    shutil.copytree(trained[0], data)
    before = {file: file.stat().st_mtime_ns for file in data.rglob("*")}
    for module, slow in ((train_judge, "exam"), (train_judge, "lessons"), (train_unet, "encode_pool")):
        monkeypatch.delattr(module, slow)
    for module in ("train_vae", "train_judge", "train_unet"):
        stage(module, data)
    stage("train_clip", data, "--text", str(data / "text"))
    assert before == {file: file.stat().st_mtime_ns for file in data.rglob("*")}


def test_an_autoencoder_is_scaled_for_the_pool_it_last_learned(
    trained: Trained, data: Path, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_vae

    for name in ("vae", "state"):
        shutil.copytree(trained[0] / name, data / name)
    with np.load(data / "pool.npz") as stored:
        pool = dict(stored)
    np.savez(data / "pool.npz", **{**pool, "images": 255 - pool["images"]})
    with pytest.raises(SystemExit, match="pool changed since"):
        stage("train_vae", data)
    monkeypatch.setattr(train_vae, "scale_of", lambda vae, images: 7.0)
    stage("train_vae", data, "--changed", "--steps", "3")
    assert json.loads((data / "vae" / "config.json").read_text())["scaling_factor"] == 7.0


@pytest.mark.parametrize("module", ["train_vae", "train_clip", "train_judge", "train_unet"])
def test_a_missing_pool_is_said(tmp_path: Path, stage: Run, module: str) -> None:
    with pytest.raises(SystemExit, match=r"there is no pool.npz in .*; run pool.py first"):
        stage(module, tmp_path)


def test_a_batch_and_a_pool_that_cannot_be_learned_from_are_refused(data: Path, stage: Run) -> None:
    with pytest.raises(SystemExit, match="--batch is 25, the pool has 24 pages; give no more"):
        stage("train_clip", data, "--batch", "25")
    with pytest.raises(SystemExit, match=r"--scenes is 0; later stages learn .* give 1 or more"):
        stage("pool", data, "--scenes", "0")


def test_drawings_and_pools_of_another_catalogue_or_of_other_drawings_are_refused(
    data: Path, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import make
    import pages
    import pool

    assert make.drawn("drawings", data) and make.drawn("pool", data)
    with np.load(data / "drawings.npz") as stored:
        drawings = dict(stored)
    np.savez(data / "drawings.npz", **{**drawings, "others": 255 - drawings["others"]})
    assert make.drawn("drawings", data) and not make.drawn("pool", data)
    with pytest.raises(SystemExit, match=r"pool.npz was drawn from other drawings than are there; run pool.py again"):
        stage("train_judge", data)
    monkeypatch.setattr(pool, "STYLES", pool.STYLES[::-1])
    with pytest.raises(SystemExit, match=r"pool.npz shows other things or styles than .* run pool.py again"):
        stage("train_vae", data)
    monkeypatch.setattr(pages, "THINGS", pages.THINGS[::-1])
    with pytest.raises(SystemExit, match=r"drawings.npz shows other things than .* run drawings.py again"):
        pages.Drawings(data / "drawings.npz")


def test_missing_drawings_and_too_little_room_are_said(data: Path, stage: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import pool
    import training

    monkeypatch.setattr(training, "need", lambda folder, count: files.need(folder, 2**70))
    import files

    with pytest.raises(SystemExit, match="MiB free, less than"):
        stage("train_vae", data)
    assert sorted(file.name for file in data.iterdir()) == ["drawings.npz", "pool.npz"]
    monkeypatch.setattr(pool, "need", lambda folder, count: files.need(folder, 2**70))
    with pytest.raises(SystemExit, match="MiB free, less than"):
        stage("pool", data)
    (data / "drawings.npz").unlink()
    monkeypatch.undo()
    with pytest.raises(SystemExit, match=r"there is no drawings.npz in .*; run drawings.py first"):
        from pages import Drawings

        Drawings(data / "drawings.npz")


def test_a_judge_that_is_not_good_enough_is_not_published(
    trained: Trained, data: Path, small: None, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_judge

    shutil.copytree(trained[0] / "vae", data / "vae")
    monkeypatch.setattr(train_judge, "NEEDED", {"thing": 1.1, "style": 0.0})
    with pytest.raises(SystemExit, match="it may not judge"):
        stage("train_judge", data)
    assert not (data / "judge").exists() and not list(data.glob("part.*"))


def test_a_judge_is_examined_anew_without_training(trained: Trained, data: Path, small: None, stage: Run) -> None:
    from esd.evaluation.judges import EmojiJudge

    for name in ("vae", "judge"):
        shutil.copytree(trained[0] / name, data / name)
    config = data / "judge" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "threshold": 0.123, "exam": {}}))
    stage("train_judge", data, "--examine")
    again = json.loads(config.read_text())
    assert again["sha256"] == told["sha256"] == EmojiJudge(data / "judge").hash and again["threshold"] != 0.123
    figures = {*("thing", "thing_and_sure", "style", "n", "outside_taken", "n_outside")}
    on_halves = {*("half_thing", "half_thing_and_sure", "half_style", "half_n")}
    assert set(again["exam"]) == figures | on_halves | {"drawings_taken", "smears_taken", "noise_taken"}
    assert (data / "judge" / "training.json").read_text() == (trained[0] / "judge" / "training.json").read_text()
    assert not (data / "state").exists()
    with pytest.raises(SystemExit, match=r"--examine is of the judge in .*, --start trains another; give one"):
        stage("train_judge", data, "--examine", "--start", str(trained[1] / "emoji-sd"))


def test_no_drawing_fixes_the_threshold_and_is_reported_on(data: Path) -> None:
    from pages import Drawings
    from train_judge import shares

    drawings = Drawings(data / "drawings.npz")
    learned, fixing, reported = shares(drawings)
    assert [*learned, *fixing, *reported] == list(range(len(drawings.others)))
    assert all(part.start % 2 == 0 and len(part) for part in (learned, fixing, reported))  # two drawings of an emoji


def test_quality_tells_its_figures_on_a_part_of_the_grid(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    import quality

    measured = ["--model", str(trained[1] / "emoji-sd"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["quality", *measured, "--steps", "1", "--every", "101", "--scenes", "7"])
    quality.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(told) == {"thing", "style", "unseen_pairs", "implied", "hypernyms", "scenes", "n"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--model", "nowhere"), "--model nowhere holds no pipeline; name a published one"),
        (("--every", "0"), "--every is 0; give 1 for the whole grid"),
        (("--every", "2", "--sheets", "here"), "--sheets show the whole grid, --every 2 draws a part of it"),
    ],
)
def test_quality_refuses_what_it_cannot_measure(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...], said: str
) -> None:
    import sys

    import quality

    monkeypatch.setattr(sys, "argv", ["quality", *asked])
    with pytest.raises(SystemExit, match=said):
        quality.main()


def test_a_model_that_names_no_judge_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    import quality

    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["quality", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"vocabulary.json names no judge; name a model whose vocabulary does"):
        quality.main()


def test_a_part_of_the_grid_holds_every_style() -> None:
    import quality
    from catalogue import STYLES

    cells = quality.grid()
    few = quality.some(cells, 10)
    assert len(few) == len(cells) // 10 and {style for _, style, _ in few} == set(range(len(STYLES)))
    assert quality.some(cells, 1) == cells


def test_an_unseen_pair_is_right_if_thing_and_style_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys
    from types import SimpleNamespace

    import quality

    class Judge:
        """Reads every thing right and every style but "flat" wrong, and is never sure of a hypernym."""

        def __call__(self, images: np.ndarray) -> SimpleNamespace:
            return SimpleNamespace(
                shows=lambda things: np.ones(len(things), bool),
                in_style=lambda styles: np.array([style == "flat" for style in styles]),
                names={"thing": ["cat"] * len(images)},
                neither=np.ones(len(images), bool),
            )

        def halves(self, images: np.ndarray) -> tuple[SimpleNamespace, SimpleNamespace]:
            return self(images), self(images)

    def blank(prompts: list[str], seed: int) -> np.ndarray:
        return np.zeros((len(prompts), 64, 64, 3), np.uint8)

    monkeypatch.setattr(quality, "painter", lambda args: blank)
    monkeypatch.setattr(quality, "load_judge", lambda model: Judge())
    monkeypatch.setattr(sys, "argv", ["quality", "--scenes", "3", "--sheets", str(tmp_path)])
    quality.main()
    assert (tmp_path / "scenes.jpg").exists() and (tmp_path / "things-1.jpg").exists()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["thing"] == told["implied"] == told["scenes"] == 1 and told["hypernyms"] == 0
    assert 0 < told["unseen_pairs"] < 0.2


def test_a_hypernym_is_asked_for_in_every_style_and_names_its_group() -> None:
    import quality
    from catalogue import HYPERNYMS, STYLES

    asked = quality.kinds()
    assert len(asked) == len(STYLES) * sum(map(len, HYPERNYMS.values()))
    assert ("plants", "a drawing of something that grows in the neon style") in asked


def test_the_sheets_show_every_thing_and_the_pairs_never_trained(tmp_path: Path) -> None:
    import quality
    from catalogue import STYLES, THINGS
    from PIL import Image

    cells = quality.grid()
    quality.grid_sheets(tmp_path, cells, np.zeros((len(cells), 64, 64, 3), np.uint8))
    sheets = [f"things-{part}.jpg" for part in range(1, -(-len(THINGS) // 36) + 1)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*sheets, "unseen-pairs.jpg"]
    with Image.open(tmp_path / "things-1.jpg") as first:
        assert first.size == (84 + 64 * len(STYLES), 16 + 64 * 36)
    with Image.open(tmp_path / "unseen-pairs.jpg") as pairs:  # every one of them is there, the last row begun or not
        assert pairs.size[1] == 112 * -(-quality.unseen(cells).sum() // 8)


def test_the_pool_shows_every_trained_pair_and_scenes(data: Path, stage: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import pool
    from catalogue import STYLES, THINGS
    from pages import Page, held_out_pairs

    monkeypatch.setattr(pool, "THINGS", THINGS[:2])
    stage("pool", data, "--variants", "1", "--scenes", "2")
    drawn = pool.Pool.load(data / "pool.npz")
    trained = [Page((t,), s) for t in range(2) for s in range(len(STYLES)) if (t, s) not in held_out_pairs()]
    pages = [drawn.page(i) for i in range(len(drawn))]
    assert pages[:-2] == trained and all(len(page.things) == 2 for page in pages[-2:])
    assert drawn.images.shape == (len(pages), 64, 64, 3)


def test_a_missing_renderer_is_said_before_anything_is_fetched(
    tmp_path: Path, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(SystemExit, match=r"resvg_py is missing; install it with: pip install -e '.\[emoji\]'"):
        stage("drawings", tmp_path)
    assert not list(tmp_path.iterdir())


def test_drawings_hold_every_thing_by_every_designer_and_others(
    tmp_path: Path, stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("resvg_py", reason="rendering needs the `emoji` extra")
    import drawings
    from catalogue import THINGS

    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 2"><rect width="4" height="2" fill="red"/></svg>'
    icons = {drawings.slug(label): svg for label in [*(t.label for t in THINGS), "abacus", "yo-yo"]}
    monkeypatch.setattr(drawings, "fetch", lambda designer, folder: icons)
    stage("drawings", tmp_path)
    with np.load(tmp_path / "drawings.npz") as stored:
        assert stored["things"].shape == (len(drawings.PACKAGES), len(THINGS), 128, 128, 4)
        assert len(stored["others"]) == 4  # two things outside the list by two designers
        assert stored["things"][0, 0, 64, 64].tolist() == [255, 0, 0, 255]
        assert stored["things"][0, 0, 0, 0, 3] == 0  # a wide drawing sits in the middle of its square
