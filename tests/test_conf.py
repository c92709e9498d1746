"""Every file in conf/ composes, opens with the command that runs it, and shows in --help."""

import dataclasses
import itertools
import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from esd.config.analyze import AnalyzeConfig
from esd.config.evaluate import EvaluateConfig
from esd.config.generate import GenerateConfig
from esd.config.options import fields_of
from esd.config.paths import conf_dir
from esd.config.train import TrainConfig
from esd.config.train_sections import ObjectiveConfig
from esd.main import help_text
from esd.objectives import Objective
from tests.programs import SCHEMAS, composed

OWN = {"evaluate": {"suite", "method"}, "analyze": {"analysis"}}  # groups that only one program knows
NEEDED = {
    "suite=emoji_canvas": ["method=esd_u"],
    "suite=prompts": ["prompts=[a cat]"],
    "suite=implicit": ["checkpoint=runs/cat"],
    "suite=attacks": ["checkpoint=runs/cat"],
    "suite=attacks_published": ["checkpoint=runs/cat"],
}
FILES = sorted(conf_dir().rglob("*.yaml"))
ROOT = Path(__file__).parents[1]
GROUPED = [path for path in FILES if path.parent != conf_dir()]


@pytest.mark.parametrize("path", GROUPED, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_group_file_composes_into_a_config_that_passes_its_checks(path: Path) -> None:
    group, choice = path.parent.name, f"{path.parent.name}={path.stem}"
    name = next((program for program, groups in OWN.items() if group in groups), "train")
    rest = {"method": ["suite=emoji_canvas"], "analysis": []}
    needed = NEEDED.get(choice, rest.get(group, ["concepts=[cat]"]))
    config = composed(name, [choice, *needed])
    assert isinstance(config, SCHEMAS[name])
    config.check()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_program_composes(name: str) -> None:
    assert isinstance(composed(name, []), SCHEMAS[name])


def test_the_default_groups_say_what_the_schema_says() -> None:
    assert composed("train", ["concepts=[cat]"]) == TrainConfig(concepts=["cat"])
    assert composed("generate", []) == GenerateConfig()
    assert composed("evaluate", []) == EvaluateConfig()
    assert composed("analyze", []) == AnalyzeConfig()
    assert Objective() == Objective(**dataclasses.asdict(ObjectiveConfig()))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(conf_dir())))
def test_every_file_opens_with_the_command_that_runs_it(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("python -m esd." in line for line in head)


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_help_lists_every_setting_and_every_group(name: str, schema: type) -> None:
    text = help_text(name, schema)
    assert all(f"  {field}=" in text for field, _, _ in fields_of(schema()))
    groups = {path.parent.name for path in GROUPED} - set().union(*OWN.values()) if name == "train" else {"model"}
    groups |= OWN.get(name, set())
    assert all(f"  {group}=" in text for group in groups)


def test_the_command_line_wins_over_an_experiment_and_an_experiment_over_its_groups() -> None:
    config = composed("train", ["experiment=upstream_alt", "concepts=[1984]", "objective.eta=5"])
    assert isinstance(config, TrainConfig)
    assert (config.objective.eta, config.training.updates, config.trajectory.sampler) == (5.0, 200, "student")
    assert config.concepts == ["1984"]


UPSTREAM = {
    "model.path": "CompVis/stable-diffusion-v1-4",
    "model.precision": "float32",
    "selection": "esd_x_2023",
    "objective.anchor": "null",
    "objective.weighting": "native",
    "trajectory.sampler": "student",
    "trajectory.guidance_scale": 3,
    "trajectory.num_steps": 50,
    "trajectory.scheduler": "ddim",
    "trajectory.rollouts": 0,
    "trajectory.size": None,
    "training.batch_size": 1,
    "training.gradient_accumulation": 1,
    "training.betas": [0.9, 0.999],
    "training.weight_decay": 0,
    "training.clip_norm": 0,
    "training.lr_schedule": "constant",
    "training.warmup": 0,
    "preserve.prompts": [],
    "prompts": ["{}"],
}
_2026: dict[str, object] = {
    "model.precision": "bfloat16",
    "selection": "esd_x",
    "objective.anchor": "concept",
    "objective.eta": 1,
    "objective.embedded_guidance": 1,
    "trajectory.sampler": "teacher",
    "trajectory.guidance_scale": 3.5,
    "trajectory.time_rule": "index",
    "trajectory.scheduler": None,
    "trajectory.size": 512,
    "training.lr": 1e-4,
    "training.updates": 1400,
}
OF_ITS_OWN: dict[str, dict[str, object]] = {
    "upstream_compvis": {
        "objective.eta": 1,
        "trajectory.time_rule": "compvis",
        "training.lr": 1e-5,
        "training.updates": 1000,
    },
    "upstream_alt": {
        "objective.eta": 2,
        "trajectory.time_rule": "alt",
        "trajectory.sample_with": "concept",
        "training.lr": 2e-5,
        "training.updates": 200,
    },
    "upstream_2025": {
        "model.precision": "bfloat16",
        "selection": "esd_x",
        "objective.anchor": "concept",
        "objective.eta": 2,
        "trajectory.sampler": "teacher",
        "trajectory.time_rule": "index",
        "trajectory.scheduler": None,
        "trajectory.sample_with": "erase_from",
        "trajectory.size": 1024,
        "training.lr": 5e-5,
        "training.updates": 200,
    },
    "upstream_2025_sdxl": {
        "model.path": "stabilityai/stable-diffusion-xl-base-1.0",
        "model.precision": "bfloat16",
        "selection": "esd_x",
        "objective.anchor": "concept",
        "objective.eta": 1,
        "objective.null": "empty",
        "trajectory.sampler": "teacher",
        "trajectory.guidance_scale": 2,
        "trajectory.negative": "zeros",
        "trajectory.scaled_input": False,
        "trajectory.time_rule": "index",
        "trajectory.scheduler": None,
        "trajectory.size": 1024,
        "training.lr": 2e-4,
        "training.updates": 200,
    },
    "upstream_2026_flux": _2026 | {"model.path": "black-forest-labs/FLUX.1-dev", "trajectory.num_steps": 28},
    "upstream_2026_klein": _2026 | {"model.path": "black-forest-labs/FLUX.2-klein-base-4B", "trajectory.num_steps": 50},
}


@pytest.mark.parametrize("experiment", sorted(path.stem for path in GROUPED if path.stem.startswith("upstream_")))
def test_upstream_columns_are_reproduced(experiment: str) -> None:
    config = composed("train", [f"experiment={experiment}", "concepts=[cat]"])
    column = UPSTREAM | OF_ITS_OWN[experiment]
    assert {name: value for name, value, _ in fields_of(config) if name in column} == column


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *FILES]
COMMAND = re.compile(r"python3? -m esd\.(train|generate|evaluate|analyze) ([^#\n`]*[^#\n`. )])")
TYPED = [(page, *found) for page in PAGES for found in COMMAND.findall(page.read_text("utf-8")) if "=" in found[1]]


@pytest.mark.parametrize(("page", "name", "typed"), TYPED, ids=lambda value: getattr(value, "name", value))
def test_every_command_that_a_page_shows_is_one_that_runs(page: Path, name: str, typed: str) -> None:
    words = [word for word in shlex.split(typed) if not word.startswith("-") and "=" in word]
    for job in jobs(words) if "--multirun" in typed else [words]:
        composed(name, job).check()


def jobs(words: list[str]) -> list[list[str]]:
    """The overrides of every job of a sweep."""
    told = OverridesParser.create().parse_overrides(words)
    choices = [
        [f"{one.key_or_group}={value}" for value in one.sweep_string_iterator()] if one.is_sweep_override() else [word]
        for word, one in zip(words, told, strict=True)
    ]
    return [list(job) for job in itertools.product(*choices)]
