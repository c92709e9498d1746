"""Prompts: the field's files are read as they are, mistakes named by line, templates expanded evenly."""

import json
from pathlib import Path

import pytest

from esd.errors import UserError
from esd.evaluation.prompts import PromptRow, articled, fill, load, say
from esd.evaluation.vocabulary import Target, Vocabulary, expand_prompts, in_turns, spared_prompts

VOCABULARY = {
    "things": [
        {"name": "cat", "group": "animals", "synonyms": ["kitty"]},
        {"name": "dog", "group": "animals"},
        {"name": "rose", "group": "plants"},
    ],
    "styles": [{"name": "mosaic"}, {"name": "neon"}],
    "phrasings": {
        "train": {"both": ["a {thing} in the {style} style"]},
        "held_out": {"both": ["one {thing}, {style}"], "thing": ["one {thing}"], "style": ["{style} art"]},
    },
    "held_out_pairs": [["cat", "neon"]],
}


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    (tmp_path / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    found = Vocabulary.load(tmp_path)
    assert found is not None
    return found


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_file_of_the_original_scripts_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "p.csv",
        '\ufeffcase_number,prompt,evaluation_seed,class\n7,"a cat, asleep",2188,cat\n8,a dog,3,\n',
    )
    assert load(path) == [
        PromptRow(7, "a cat, asleep", 2188, None, {"class": "cat"}),
        PromptRow(8, "a dog", 3),
    ]


def test_names_of_other_benchmarks_are_understood(tmp_path: Path) -> None:
    path = written(tmp_path, "i2p.csv", "prompt,sd_seed,sd_guidance_scale,image_id\na cat,4027103558,7.5,12\n")
    assert load(path) == [PromptRow(12, "a cat", 4027103558, 7.5)]


def test_sizes_of_a_row_are_read_and_the_row_numbers_of_pandas_are_no_label(tmp_path: Path) -> None:
    text = ",Unnamed: 0,prompt,sd_image_width,sd_image_height,artist\n0,0,a cat,512,256,Monet\n1,1,a dog,,,\n"
    assert load(written(tmp_path, "p.csv", text)) == [
        PromptRow(0, "a cat", 0, None, {"artist": "Monet"}, height=256, width=512),
        PromptRow(1, "a dog", 0),
    ]


def test_a_template_is_a_row_for_each_way_to_fill_it(tmp_path: Path) -> None:
    names = {"thing": ["cat", "owl"], "style": ["neon"]}
    rows = load(["a rose", "a {thing}, {style}"], seed=3, names=names)
    assert rows == [
        PromptRow(0, "a rose", 3),
        PromptRow(1, "a cat, neon", 4, labels={"thing": "cat", "style": "neon"}),
        PromptRow(2, "an owl, neon", 5, labels={"thing": "owl", "style": "neon"}),
    ]
    path = written(tmp_path, "p.csv", "case_number,prompt,seed,set\n7,a {thing},1,x\n9,{{weird}} art,2,x\n")
    assert load(path, names=names) == [
        PromptRow(7, "a cat", 1, labels={"set": "x", "thing": "cat"}),
        PromptRow(8, "an owl", 1, labels={"set": "x", "thing": "owl"}),
        PromptRow(9, "{{weird}} art", 2, labels={"set": "x"}),
    ]
    with pytest.raises(UserError, match=r"line 2: .* ships no vocabulary"):
        load(path)


def test_every_picture_of_a_template_begins_with_noise_of_its_own() -> None:
    names = {"thing": ["cat", "owl"], "style": ["neon", "pop art"]}
    rows = load(["a cat in {style}", "a {thing} in {style}"], seed=9, samples=3, names=names)
    assert [row.evaluation_seed for row in rows] == [9, 12, 15, 18, 21, 24], "three each, and the same prompt again"


def test_a_template_is_labelled_with_the_name_that_stands_in_it() -> None:
    names = {"thing": ["cat", "owl", "hot dog", "dog"], "style": ["neon", "pop art"]}
    for template, labels in {
        "a cat in {style}": {"thing": "cat", "style": "neon"},
        "a hot dog in {style}": {"thing": "hot dog", "style": "neon"},
        "pop art: a {thing}": {"thing": "cat", "style": "pop art"},
        "a cat beside a {thing}": {"thing": "cat"},
        "a cat beside an owl in {style}": {"style": "neon"},
        "a catalogue in {style}": {"style": "neon"},
    }.items():
        assert load([template], names=names)[0].labels == labels
    assert load(["a cat"], names=names)[0].labels == {}


def test_json_lines_and_lists_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", '{"prompt": "a cat", "seed": 5, "style": "neon"}\n\n{"prompt": "a dog"}\n')
    assert load(path, seed=9) == [PromptRow(0, "a cat", 5, None, {"style": "neon"}), PromptRow(1, "a dog", 9)]
    assert [row.prompt for row in load(["a cat", "a dog"])] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.csv", "prompt\n", "no prompts"),
        ("p.csv", "text,seed\na cat,1\n", "needs one named 'prompt'"),
        ("p.csv", "prompt,seed\na cat,1\n ,2\n", "line 3: the prompt is empty"),
        ("p.csv", "prompt,seed\na cat,x\n", "seed='x' is no number"),
        ("p.csv", "prompt,seed\na cat,-1\n", "whole number from 0"),
        ("p.csv", "prompt,guidance\na cat,nan\n", "guidance=nan"),
        ("p.csv", "prompt,width\na cat,0\n", "width=0; allowed: at least 1 pixel"),
        ("p.csv", "prompt,width\na cat,wide\n", "width='wide' is no number"),
        ("p.csv", "case_number,prompt\n1,a cat\n1,a dog\n", "case_number 1 stands twice"),
        ("p.csv", "prompt\na cat\na cat\n", "stands twice"),
        ("p.csv", "prompt,thing,thing\na cat,cat,dog\n", "'thing' in two columns"),
        ("p.csv", "prompt,seed\na cat, asleep,1\n", "line 2 has more fields than the columns, ['1']"),
        ("p.csv", 'prompt,seed\n"a cat,1\na dog,2\n', "line 2 is no CSV (unexpected end of data)"),
        ("p.csv", 'prompt,seed\n"a cat,1\n"a dog",2\n', "line 2 is no CSV"),
        ("p.csv", f"prompt,seed\na cat,{2**63}\n", "from 0 to 2^63 - 1"),
        ("p.csv", "prompt,seed\na cat,inf\n", "from 0 to 2^63 - 1"),
        ("p.jsonl", '{"prompt": ["a cat"]}\n', "line 1: ['a cat'] is no text"),
        ("p.jsonl", '{"prompt": true}\n', "True is no text"),
        ("p.jsonl", '{"prompt": null}\n', "None is no text"),
        ("p.jsonl", '{"prompt": "a cat \\ud83d"}\n', "line 1: 'a cat \\ud83d' holds half a character"),
        ("p.jsonl", '{"seed": 1}\n', "the prompt is empty"),
        ("p.jsonl", "[1]\n", "not an object"),
        ("p.jsonl", "{\n", "line 1 is not JSON"),
        ("p.txt", "a cat\n", ".csv or .jsonl"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        load(written(tmp_path, name, text))
    assert told in str(raised.value)


def test_pictures_that_would_count_twice_are_refused(tmp_path: Path) -> None:
    seeds = written(tmp_path, "seeds.csv", "prompt,seed\na cat,0\na cat,1\na cat,4\n")
    assert len(load(seeds)) == 3
    with pytest.raises(UserError, match=r"'a cat' with seed 1 stands twice, .*, 2 apart"):
        load(seeds, samples=2)
    scales = written(tmp_path, "scales.csv", "prompt,guidance\na cat,\na cat,4\n")
    assert len(load(scales)) == len(load(scales, guidance=7.5)) == 2
    with pytest.raises(UserError, match="'a cat' with seed 0 stands twice"):
        load(scales, guidance=4.0)


def test_missing_files_binary_files_and_empty_lists_are_mistakes(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"prompt\n\xff\xfe\n")
    for source in (tmp_path / "none.csv", tmp_path / "p.csv", [], ["a cat", ""]):
        with pytest.raises(UserError):
            load(source)


def test_a_template_is_filled_with_every_thing_and_style_and_says_which() -> None:
    assert list(fill("a {thing} in {style}", ["cat", "dog"], ["neon"])) == [
        ("a cat in neon", {"thing": "cat", "style": "neon"}),
        ("a dog in neon", {"thing": "dog", "style": "neon"}),
    ]
    assert list(fill("a {thing}", ["owl"], ["neon", "mosaic"])) == [("an owl", {"thing": "owl"})]


@pytest.mark.parametrize(
    ("concept", "domain"), [("cat", "thing"), ("A Kitty", "thing"), ("neon", "style"), ("a pet", None)]
)
def test_a_concept_is_known_by_name_and_synonym(vocabulary: Vocabulary, concept: str, domain: str | None) -> None:
    found = vocabulary.find(concept)
    assert (found and found[0]) == domain


def test_neighbours_of_the_same_group_come_first(vocabulary: Vocabulary) -> None:
    assert vocabulary.neighbours("thing", "rose") == ["cat", "dog"]
    assert vocabulary.neighbours("thing", "dog") == ["cat", "rose"]


def test_training_templates_run_over_everything_but_the_erased(vocabulary: Vocabulary) -> None:
    assert expand_prompts(["a cat", "a {thing} in {style}"], vocabulary, but=vocabulary.targets(["kitty"])) == [
        ["a cat"],
        ["a dog in mosaic", "a dog in neon", "a rose in mosaic", "a rose in neon"],
    ]


def test_what_is_erased_from_one_thing_only_stays_with_all_others(vocabulary: Vocabulary) -> None:
    erased = vocabulary.targets(["mosaic"], ["a kitty in mosaic"])
    assert erased == [Target("style", "mosaic", within="cat")] == vocabulary.targets(["mosaic"], ["cat"])
    templates = ["a {thing} in {style}", "a {thing} in mosaic", "a kitty in {style}", "a cat", "a {thing}"]
    whole, other_things, other_styles, alone, things = spared_prompts(templates, vocabulary, erased)
    assert set(whole) == {f"a {t} in {s}" for t in ("cat", "dog", "rose") for s in ("mosaic", "neon")} - {
        "a cat in mosaic"
    }
    assert other_things == ["a dog in mosaic", "a rose in mosaic"]
    assert other_styles == ["a kitty in neon"]
    assert alone == ["a cat"] and things == ["a cat", "a dog", "a rose"]


@pytest.mark.parametrize(
    ("erase_from", "template"),
    [
        ([], "a cat in the {style} style"),
        ([], "a kitty"),
        (["a cat in mosaic"], "a cat in mosaic"),
        (["a cat in mosaic"], "mosaic: a {thing}, which is a cat"),
    ],
)
def test_a_template_that_names_what_is_erased_itself_cannot_be_preserved(
    vocabulary: Vocabulary, erase_from: list[str], template: str
) -> None:
    erased = vocabulary.targets(["cat"], erase_from)
    with pytest.raises(UserError, match="names what is erased, which cannot be preserved too"):
        spared_prompts(["a {thing} in neon", template], vocabulary, erased)


def test_a_prompt_that_names_what_is_erased_beside_another_is_not_preserved(vocabulary: Vocabulary) -> None:
    erased = vocabulary.targets(["cat"])
    assert spared_prompts(["a {thing} beside a dog"], vocabulary, erased) == [
        ["a dog beside a dog", "a rose beside a dog"]
    ]
    with pytest.raises(UserError, match="names what is erased"):
        spared_prompts(["a dog beside a cat"], vocabulary, erased)


def test_a_concept_is_trained_on_with_all_that_is_not_erased(vocabulary: Vocabulary) -> None:
    erased = vocabulary.targets(["cat", "mosaic"])
    assert expand_prompts(["a cat in {style}", "a {thing} in mosaic"], vocabulary, but=erased) == [
        ["a cat in neon"],
        ["a dog in mosaic", "a rose in mosaic"],
    ]
    with pytest.raises(UserError, match="knows nothing but what is erased to fill them from"):
        expand_prompts(["a cat in {style}"], vocabulary, but=vocabulary.targets(["mosaic", "neon"]))


def test_a_text_names_what_stands_in_it_as_words(vocabulary: Vocabulary) -> None:
    assert vocabulary.named("Neon: a kitty beside a dog") == {"thing": "cat", "style": "neon"}
    assert vocabulary.named("a catalogue of doggerel") == {}


def test_a_template_that_needs_a_vocabulary_is_refused_without_one(tmp_path: Path) -> None:
    assert Vocabulary.load(tmp_path) is None
    assert expand_prompts(["a cat"], None) == [["a cat"]]
    with pytest.raises(UserError, match="ships no vocabulary"):
        expand_prompts(["a cat in {style}"], None)


def test_a_broken_vocabulary_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "vocabulary.json", '{"things": []}')
    with pytest.raises(UserError, match="no vocabulary"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    "held_out",
    [
        {"thing": ["a {thing}"], "style": ["{style}"]},
        {"both": [], "thing": ["a {thing}"], "style": ["{style}"]},
        {"both": ["a {thing}"], "thing": ["a {thing}"], "style": ["{style}"]},
        {"both": ["{thing} {style}"], "thing": "a {thing}", "style": ["{style}"]},
        {"both": ["{thing} {style}"], "thing": ["a {thing}"], "style": [3]},
    ],
)
def test_a_vocabulary_that_rates_cannot_be_measured_with_is_refused(tmp_path: Path, held_out: object) -> None:
    written(tmp_path, "vocabulary.json", json.dumps(VOCABULARY | {"phrasings": {"held_out": held_out}}))
    with pytest.raises(UserError, match=r"phrasings\.held_out\.(both|thing|style) is .*; allowed: a list"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "word", "said"),
    [
        ("a photo of a pizza {}", "owl", "a photo of a pizza owl"),
        ("extra {}", "owl", "extra owl"),
        ("vitamin-a {}", "owl", "vitamin-a owl"),
        ("A {}", "owl", "An owl"),
        ("A {}, an {}", "cat", "A cat, a cat"),
        ("A {}", "grapes", "Grapes"),
        ("('a {}')", r"\1 owl", r"('a \1 owl')"),
    ],
)
def test_only_an_article_that_stands_alone_becomes_the_words_own(template: str, word: str, said: str) -> None:
    assert say(template, {"": word}) == said


@pytest.mark.parametrize("prompts", [[None], ["a cat", ["a dog"]], [{"prompt": "a cat"}], [True]])
def test_a_prompt_that_is_no_text_is_refused(prompts: list[object]) -> None:
    with pytest.raises(UserError, match="is no text"):
        load(prompts)


def test_a_number_is_a_prompt(tmp_path: Path) -> None:
    assert [row.prompt for row in load([1984, 0])] == ["1984", "0"]
    assert [row.prompt for row in load(written(tmp_path, "p.jsonl", '{"prompt": 0}'))] == ["0"]


def test_the_largest_seed_and_empty_fields_after_the_last_column_are_read(tmp_path: Path) -> None:
    (row,) = load(written(tmp_path, "p.csv", f"prompt,seed\na cat,{2**63 - 1},,\n"))
    assert row.evaluation_seed == 2**63 - 1


@pytest.mark.parametrize("said", ["a unicorn", "a university", "a euro", "a one-eyed cat", "an owl", "an umbrella"])
def test_articles_follow_the_sound(said: str) -> None:
    assert articled(said.split(" ", 1)[1]) == said


def test_templates_take_turns_whatever_they_expand_to() -> None:
    assert in_turns([["a"], ["x", "y", "z"]]) == ["a", "x", "a", "y", "a", "z"]
    assert in_turns([]) == []
