"""Configuration: every value is checked before anything heavy happens; any text makes a safe file name."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esd.config.analyze import AnalyzeConfig
from esd.config.generate import GenerateConfig
from esd.config.options import fields_of
from esd.config.paths import conf_dir, slug
from esd.config.train import TrainConfig
from esd.errors import UserError


def config(**settings: object) -> TrainConfig:
    """A good configuration, changed at dotted names written with two underscores."""
    made = TrainConfig(concepts=["cat"])
    for name, value in settings.items():
        *path, last = name.split("__")
        section: object = made
        for part in path:
            section = getattr(section, part)
        setattr(section, last, value)
    return made


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"concepts": []}, "concepts=[]"),
        ({"weights__rank": 8}, "weights.rank=8 says nothing about weights=full"),
        ({"weights__kind": "lora"}, "weights.rank is not set"),
        ({"weights__masters": False}, "model.precision=float32"),
        ({"weights__masters": False, "weights__kind": "lora", "weights__rank": 8}, "weights=lora"),
        (
            {"weights__masters": False, "model__precision": "bfloat16", "training__mixed_precision": "bf16"},
            "training.mixed_precision=bf16: allowed with bfloat16, full, and auto or no",
        ),
        ({"weights__kind": "lora", "weights__rank": 0}, "weights.rank=0"),
        ({"weights__kind": "lora", "weights__rank": 8, "weights__alpha": -1.0}, "weights.alpha=-1"),
        ({"concepts": [" "]}, "empty"),
        ({"concepts": ["x" * 10_000]}, "10000 characters"),
        ({"concepts": ["cat\ndog"]}, "line break"),
        ({"concepts": ["a {thing}"]}, "brace"),
        ({"concepts": ["cat", "cat"]}, "twice"),
        ({"erase_from": ["cowboy", "man"]}, "erase_from"),
        ({"prompts": []}, "prompts=[]"),
        ({"prompts": ["a cat"]}, "never names the concept"),
        ({"objective__eta": math.nan}, "objective.eta=nan"),
        ({"objective__eta": math.inf}, "objective.eta=inf"),
        ({"objective__eta": -1.0}, "objective.eta=-1.0"),
        ({"objective__anchor": "cat"}, "null, concept"),
        ({"trajectory__num_steps": 0}, "trajectory.num_steps=0"),
        ({"trajectory__staleness": 4}, "trajectory.staleness=4 with trajectory.sampler=teacher"),
        ({"trajectory__sampler": "student", "trajectory__staleness": 0}, "trajectory.staleness=0"),
        ({"trajectory__rollouts": 0, "trajectory__reuse": 4}, "trajectory.reuse=4 with trajectory.rollouts=0"),
        ({"trajectory__negative": "empty", "trajectory__guidance_scale": 1.0}, "no negative prompt is asked"),
        ({"preserve__weight": 5.0}, "preserve.weight=5 without preserve.prompts"),
        ({"training__updates": 0}, "training.updates=0"),
        ({"training__lr": 0.0}, "training.lr=0.0"),
        ({"training__betas": [0.9, 1.0]}, "training.betas"),
        ({"training__betas": [0.9]}, "takes two"),
        ({"training__weight_decay": -0.1}, "training.weight_decay"),
        ({"training__weight_decay": 200.0, "training__lr": 0.01}, "allowed: up to 1, here training.weight_decay=100"),
        ({"trajectory__scheduler": "magic"}, "allowed: ddim, ddpm"),
        ({"trajectory__scheduler": "euler", "trajectory__time_rule": "alt"}, "use trajectory.scheduler=ddim"),
        ({"trajectory__num_steps": 2, "trajectory__time_rule": "compvis"}, "at least 3 steps"),
        ({"concepts": ["brown  cat", " a brown cat "]}, "twice"),
        ({"evaluation__num_steps": 0}, "evaluation.num_steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "gpu"}, "device=gpu"),
        ({"device_memory": 0.0}, "for example device_memory=null"),
        ({"tracker__name": "excel"}, "none, wandb, tensorboard"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserError) as raised:
        config(**settings).check()
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("concept", ["AC/DC", 'Kilian Eng\'s "art"', "🐱", "👩‍🚀", "Beyoncé", "猫", "a, b"])
def test_any_line_of_text_may_be_a_concept(concept: str) -> None:
    config(concepts=[concept]).check()


def test_leading_articles_are_left_to_the_templates() -> None:
    made = config(concepts=["a cat", "The   owl ", "a", "  van  gogh"])
    made.check()
    assert made.concepts == ["cat", "owl", "a", "van gogh"]


def test_an_attribute_is_erased_towards_what_it_is_erased_from() -> None:
    made = config(erase_from=["cowboy"])
    made.check()
    assert made.objective.anchor == "erase_from"


def test_an_anchor_of_null_in_yaml_is_the_null_anchor() -> None:
    made = config(objective__anchor=None)
    made.check()
    assert made.objective.anchor == "null"


@given(st.text(min_size=1, max_size=200))
def test_a_slug_is_one_safe_path_component(text: str) -> None:
    assert Path(slug(text)).name == slug(text)
    assert slug(text).isascii() and len(slug(text)) <= 60 and not slug(text).startswith((".", "-"))


def test_slugs_tell_apart_what_looks_alike() -> None:
    assert len({slug(text) for text in ("AC/DC", "ac-dc", "AC DC", "🐱", "🐶")}) == 5


def test_the_run_directory_is_named_after_the_concepts() -> None:
    assert config(concepts=["AC/DC"]).run_path() == Path("runs") / slug("AC/DC")
    assert config(run_dir="elsewhere").run_path() == Path("elsewhere")


@pytest.mark.parametrize("schema", [TrainConfig, GenerateConfig, AnalyzeConfig])
def test_every_setting_says_what_it_means(schema: type) -> None:
    assert all(spec.metadata["help"] for _, _, spec in fields_of(schema()))


def test_defaults_keep_their_own_rules() -> None:
    config().check()
    dataclasses.replace(GenerateConfig(), prompts=["a cat"]).check()
    AnalyzeConfig().check()


def test_the_folder_of_settings_is_found() -> None:
    assert (conf_dir() / "train.yaml").is_file()
