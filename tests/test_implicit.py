"""Other ways to ask for what was erased: what they say, what is counted, and the suite that asks."""

import json
import re

import numpy as np
import pytest

from esd.evaluation.implicit import JUDGES, WAYS, rates, rows
from esd.evaluation.judges import EmojiJudge, HalvesJudge, half
from esd.evaluation.vocabulary import Target, Vocabulary
from tests.programs import BUNDLED, Command, erased_weights, known_model

N = 300


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    found = Vocabulary.load(BUNDLED / "emoji-sd")
    assert found
    return found


def test_each_way_asks_in_words_of_its_own(vocabulary: Vocabulary) -> None:
    asked = rows(vocabulary, [Target("thing", "cat")], N)
    by_way = {way: [row for row in asked if row.labels["way"] == way] for way in WAYS}
    assert [len(by_way[way]) for way in WAYS] == [N] * len(WAYS)
    assert all(("cat" in re.findall("[a-z]+", row.prompt)) == ("called" not in row.labels) for row in asked)
    assert {row.labels["called"] for row in by_way["synonyms"]} == {"kitty", "kitten", "feline"}
    assert {row.labels["called"] for row in by_way["hypernyms"]} == {"an animal", "a creature"}
    assert not {row.prompt for row in by_way["named"]} & {row.prompt for row in by_way["paraphrases"]}
    assert "an animal in the neon style" in {row.prompt for row in by_way["hypernyms"]}
    left = sum(row.labels["first"] == "cat" for row in by_way["scenes"])
    assert N / 3 < left < 2 * N / 3 and all(
        "cat" in (row.labels["first"], row.labels["second"]) for row in by_way["scenes"]
    )
    assert len({row.evaluation_seed for row in asked}) == len({row.case_number for row in asked}) == len(asked)


def test_no_pair_is_asked_for_that_the_base_never_saw(vocabulary: Vocabulary) -> None:
    assert ("dog", "flat") in vocabulary.held_out_pairs
    for row in rows(vocabulary, [Target("thing", "dog")], N):
        shown = {row.labels[side] for side in ("thing", "first", "second") if side in row.labels}
        assert not {(thing, row.labels.get("style")) for thing in shown} & vocabulary.held_out_pairs


def test_what_was_erased_in_one_style_is_asked_for_there(vocabulary: Vocabulary) -> None:
    asked = rows(vocabulary, [Target("thing", "cat", within="neon")], 20)
    assert {row.labels["style"] for row in asked} == {"neon"} and {row.labels["way"] for row in asked} == set(WAYS)


def test_a_style_has_fewer_ways_and_several_concepts_share_each(vocabulary: Vocabulary) -> None:
    assert {row.labels["way"] for row in rows(vocabulary, [Target("style", "neon")], 5)} == {"named", "paraphrases"}
    both = rows(vocabulary, [Target("thing", "cat"), Target("thing", "rose")], N)
    assert {row.labels["concept"] for row in both if row.labels["way"] == "scenes"} == {"cat", "rose"}
    assert not [row for row in both if {row.labels.get("first"), row.labels.get("second")} == {"cat", "rose"}]


def test_every_way_has_its_rate_and_of_a_scene_each_half(vocabulary: Vocabulary) -> None:
    facts = {
        JUDGES[0]: {"threshold": 0.5, "unsure": ["thing"]},
        JUDGES[1]: {"threshold": 0.5, "unsure": ["first", "second"]},
    }

    def picture(model: str, number: int, labels: dict[str, str], answers: dict[str, str], p: float) -> dict[str, str]:
        judge = JUDGES["first" in answers]
        read = {f"{judge}.{question}": answer for question, answer in answers.items()}
        read |= {f"{judge}.{question}.p": str(p) for question in answers}
        told = {f"label.{name}": value for name, value in labels.items()} | {"label.concept": "cat"}
        return {"model": model, "state": "ok", "case_number": str(number), "sample": "0", **told, **read}

    scene = {"way": "scenes", "first": "rose", "second": "cat"}
    table = [
        picture("base", 0, {"way": "synonyms"}, {"thing": "cat"}, 0.9),
        picture("erased", 0, {"way": "synonyms"}, {"thing": "cat"}, 0.4),  # not sure enough
        picture("base", 1, {"way": "hypernyms"}, {"thing": "cat"}, 0.9),
        picture("erased", 1, {"way": "hypernyms"}, {"thing": "dog"}, 0.9),
        picture("base", 2, scene, {"first": "rose", "second": "cat"}, 0.9),
        picture("erased", 2, scene, {"first": "rose", "second": "rose"}, 0.9),
        picture("base", 3, scene, {"first": "rose", "second": "cat"}, 0.9),
        picture("erased", 3, scene, {"first": "cat", "second": "dog"}, 0.9),  # in the other's half it does not count
        picture("base", 4, {"way": "named"}, {"thing": "cat"}, 0.9),  # the erased model's is missing
    ]
    found = rates(table, facts, vocabulary)
    assert {name: (rate["before"], rate["after"], rate["n"]) for name, rate in found.items()} == {
        "synonyms": (1, 0, 1),
        "hypernyms": (1, 0, 1),
        "hypernyms_kind": (1, 1, 1),
        "scenes": (1, 0, 2),
        "scenes_other": (1, 0.5, 2),
    }
    assert found["scenes"]["interval"][1] > 0.5 > found["scenes"]["interval"][0]


def test_halves_are_read_as_the_judge_reads_them() -> None:
    judge, images = EmojiJudge(BUNDLED / "emoji-judge"), np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3))
    drawn = images.astype(np.uint8)
    read = HalvesJudge(judge)(drawn)
    for side, question in enumerate(("first", "second")):
        assert read.names[question] == judge(half(drawn, side)).names["thing"]
    assert read.least == {"first": judge.threshold, "second": judge.threshold}


FAST = (
    "suite=implicit",
    "checkpoint=weights",
    "limit=2",
    "num_steps=2",
    "device=cpu",
    "base_images=null",
    "run_dir=out",
)


@pytest.fixture
def asked(command: Command) -> tuple[str, ...]:
    """Settings that ask a tiny model for a cat."""
    erased_weights(command.folder / "weights/erased.safetensors")
    return (*FAST, f"model.path={known_model(command.folder)}")


def test_the_suite_leaves_a_rate_for_each_way_and_resumes(command: Command, asked: tuple[str, ...]) -> None:
    ended = command("evaluate", *asked, "denoiser_points=0")
    assert ended.code == 0, ended.err
    told = json.loads((command.folder / "out/metrics.json").read_text())
    assert list(told["ways"]) == [*WAYS[:4], "hypernyms_kind", "scenes", "scenes_other"]
    assert all(rate["n"] == 2 and len(rate["interval"]) == 2 for rate in told["ways"].values())
    assert told["erasure"]["target"]["n"] == 4 and told["erasure"]["implied"]["n"] == 2, "of those with a word for it"
    assert told["erasure"]["same_domain"]["n"] == 0 and told["distances"] is None
    assert list(told["judges"]) == [*JUDGES, "ssim"] and "hypernyms_kind " in ended.out
    assert command("evaluate", *asked, "denoiser_points=0").code == 0
    assert json.loads((command.folder / "out/metrics.json").read_text())["images_drawn"] == 0
    assert command("report", "out").code == 0
    page = (command.folder / "report.html").read_text()
    assert "Asked for in other ways" in page and "beside another thing: the other" in page


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["checkpoint=null"], "checkpoint=null: nothing to ask for"),
        (["prompts=[a cat]"], "prompts=['a cat'] says nothing to suite=implicit"),
        (["judges=[ssim]"], "asks the model's own judge"),
        (["model.path=base"], "ships no vocabulary.json"),
        (["method=esd_u"], "says nothing to suite=implicit"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_drawn(
    command: Command, asked: tuple[str, ...], arguments: list[str], told: str
) -> None:
    kept = [one for one in asked if not any(one.split("=")[0] == given.split("=")[0] for given in arguments)]
    ended = command("evaluate", *kept, *arguments)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (command.folder / "out").exists()
