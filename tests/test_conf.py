"""Every file in conf/ composes, opens with the command that runs it, and shows in --help."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from esd.config import GenerateConfig, TrainConfig, conf_dir, fields_of
from esd.main import help_text

SCHEMAS = {"train": TrainConfig, "generate": GenerateConfig}
FILES = sorted(conf_dir().rglob("*.yaml"))
GROUPED = [path for path in FILES if path.parent != conf_dir()]


def composed(name: str, overrides: list[str]) -> TrainConfig | GenerateConfig:
    ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name])
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return OmegaConf.to_object(compose(config_name=name, overrides=overrides))


@pytest.mark.parametrize("path", GROUPED, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_group_file_composes_into_a_config_that_passes_its_checks(path: Path) -> None:
    config = composed("train", [f"{path.parent.name}={path.stem}", "concepts=[cat]"])
    assert isinstance(config, TrainConfig)
    config.check()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_program_composes(name: str) -> None:
    assert isinstance(composed(name, []), SCHEMAS[name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(conf_dir())))
def test_every_file_opens_with_the_command_that_runs_it(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("python -m esd." in line for line in head)


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_help_lists_every_setting_and_every_group(name: str, schema: type) -> None:
    text = help_text(name, schema)
    assert all(f"  {field}=" in text for field, _, _ in fields_of(schema()))
    groups = {path.parent.name for path in GROUPED} if name == "train" else {"model"}
    assert all(f"  {group}=" in text for group in groups)


def test_the_command_line_wins_over_an_experiment_and_an_experiment_over_its_groups() -> None:
    config = composed("train", ["experiment=upstream_alt", "concepts=[1984]", "objective.eta=5"])
    assert isinstance(config, TrainConfig)
    assert (config.objective.eta, config.training.updates, config.trajectory.sampler) == (5.0, 200, "student")
    assert config.concepts == ["1984"]


@pytest.mark.parametrize(
    ("experiment", "eta", "anchor", "lr", "updates", "sampler", "time_rule"),
    [
        ("upstream_compvis", 1, "null", 1e-5, 1000, "student", "compvis"),
        ("upstream_alt", 2, "null", 2e-5, 200, "student", "alt"),
        ("upstream_2025", 2, "concept", 5e-5, 200, "teacher", "index"),
    ],
)
def test_upstream_columns_are_reproduced(
    experiment: str, eta: float, anchor: str, lr: float, updates: int, sampler: str, time_rule: str
) -> None:
    config = composed("train", [f"experiment={experiment}", "concepts=[cat]"])
    assert isinstance(config, TrainConfig)
    found = (
        config.objective.eta,
        config.objective.anchor,
        config.training.lr,
        config.training.updates,
        config.trajectory.sampler,
        config.trajectory.time_rule,
    )
    assert found == (eta, anchor, lr, updates, sampler, time_rule)
    assert (config.trajectory.guidance_scale, config.trajectory.num_steps, config.training.batch_size) == (
        3,
        50,
        1,
    )
