"""The bundled model as it is shipped: its size, its files, and what it can be asked to do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel

from esd.evaluation.generate import sample
from esd.evaluation.judges import EmojiJudge, load_judge
from esd.evaluation.prompts import fill
from esd.evaluation.vocabulary import Vocabulary
from esd.families import family_of
from esd.interventions import AttentionMaps, positions_of
from esd.interventions import sample as sample_under_ops
from tests.programs import BUNDLED

MODEL = BUNDLED / "emoji-sd"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(MODEL)


def test_three_models_fit_in_35_mb_of_shards_of_12() -> None:
    sizes = {file: file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file()}
    assert sum(sizes.values()) <= 35_000_000
    assert max(sizes.values()) <= 12_000_000


def test_stock_diffusers_loads_it_in_one_precision_when_none_is_asked_for(pipe: StableDiffusionPipeline) -> None:
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}


def test_it_draws_the_things_it_is_asked_for_in_the_styles(pipe: StableDiffusionPipeline) -> None:
    judge = load_judge(MODEL)
    assert judge is not None
    things, styles = ["cat", "pizza", "rocket", "owl"], ["pop art", "mosaic"]
    prompts, labels = zip(*fill("a drawing of a {thing} in the {style} style", things, styles), strict=True)
    seeds = range(len(prompts))
    images = sample(pipe, prompts, seeds, num_steps=15, guidance_scale=4.0, batch_size=8)
    readings = judge(images)
    assert readings.shows([told["thing"] for told in labels]).mean() >= 0.75
    assert readings.in_style([told["style"] for told in labels]).mean() >= 0.75


def test_clip_reads_words_as_the_pipeline_does(pipe: StableDiffusionPipeline) -> None:
    clip = CLIPModel.from_pretrained(BUNDLED / "emoji-clip", dtype=torch.float16).text_model.state_dict()
    text = {name.removeprefix("text_model."): value for name, value in pipe.text_encoder.state_dict().items()}
    assert clip.keys() == text.keys()
    assert all(torch.equal(clip[name], value.half()) for name, value in text.items())


def test_the_parts_were_trained_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BUNDLED.parent / "scripts" / "emoji")
    from files import folder_digest

    folders = {"vae": "vae", "tokenizer": "tokenizer", "text": "text_encoder"}
    shipped = {part: folder_digest(MODEL / folder) for part, folder in folders.items()}
    for runs in json.loads((MODEL / "training.json").read_text()).values():
        assert all(shipped.get(part, seen) == seen for run in runs[-1:] for part, seen in run["made_from"].items())


def test_vocabulary_and_judge_know_the_same_words() -> None:
    vocabulary, judge = Vocabulary.load(MODEL), EmojiJudge(BUNDLED / "emoji-judge")
    assert vocabulary is not None
    assert list(judge.things) == vocabulary.names("thing") and len(judge.things) >= 100
    assert list(judge.styles) == vocabulary.names("style") and len(judge.styles) >= 8


def test_judge_passed_its_exam_and_takes_noise_for_nothing() -> None:
    judge = EmojiJudge(BUNDLED / "emoji-judge")
    exam = json.loads((BUNDLED / "emoji-judge" / "config.json").read_text())["exam"]
    assert exam["thing"] >= 0.97 and exam["style"] >= 0.95 and exam["outside_taken"] <= 0.06
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    assert judge(noise).neither.mean() >= 0.9


def test_a_reading_does_not_depend_on_the_precision_around_it() -> None:
    judge = EmojiJudge(BUNDLED / "emoji-judge")
    images = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    plain = judge(images)
    with torch.autocast("cpu", torch.bfloat16):
        inside = judge(images)
    assert np.array_equal(plain.p["thing"], inside.p["thing"])


@pytest.mark.parametrize("folder", ["emoji-sd", "emoji-clip", "emoji-judge"])
def test_every_model_has_a_card_with_licence(folder: str) -> None:
    assert "license:" in (BUNDLED / folder / "README.md").read_text()


def test_words_of_a_scene_are_attended_to_on_their_side(pipe: StableDiffusionPipeline) -> None:
    family, scenes = family_of(pipe), [("cat", "rose"), ("dog", "pizza"), ("rose", "cat"), ("owl", "rocket")]
    prompts = [f"a {first} and a {second}" for first, second in scenes]
    maps = AttentionMaps("cross", resolution=8)
    sample_under_ops(family, prompts, range(4), maps, num_steps=8)
    mean = maps.maps.mean()
    for row, (prompt, words) in enumerate(zip(prompts, scenes, strict=True)):
        shares = [float(at[:, :4].sum() / at.sum()) for word in words for at in
                  [mean[row, positions_of(family, prompt, word)].sum(0)]]  # fmt: skip
        assert shares[0] > 0.6 > 0.4 > shares[1], (prompt, shares)
