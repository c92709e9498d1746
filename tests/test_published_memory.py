"""Real models by their published configurations: every experiment takes the memory that docs/memory.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from esd import memory
from esd.config import TrainConfig
from esd.memory import GB, Memory
from esd.train import make_plan, mixed_precision
from tests import published
from tests.test_conf import composed

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
QUICK = ("klein",)  # the fastest of them; each of the others takes about a minute


def planned(experiment: str) -> Memory:
    """What an experiment takes, its model by the published configurations."""
    config = composed("train", [f"experiment={experiment}", "concepts=[van gogh]"])
    assert isinstance(config, TrainConfig)
    config.check()
    name = published.EXPERIMENTS[experiment]
    return memory.measure(
        published.family(name),
        make_plan(config, None),
        published.conditioning(name),
        mixed_precision=mixed_precision(config, "no"),
        images=config.evaluation.batch_size,
        guidance_scale=config.evaluation.guidance_scale,
    )


def documented() -> dict[str, list[float]]:
    """Experiment to GB of each phase, from the table."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Six real models")[1].split("\n## ")[0]
    rows = [[cell.strip(" `*") for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", section, re.M)]
    return {experiment: [float(cell) for cell in cells] for experiment, *cells in rows[2:]}


def check(experiment: str) -> None:
    found = [phase.total / GB for phase in planned(experiment).phases]
    assert found == pytest.approx(documented()[experiment], abs=0.06), [round(size, 1) for size in found]


@pytest.mark.parametrize("experiment", QUICK)
def test_an_experiment_takes_the_memory_that_the_document_says(experiment: str) -> None:
    check(experiment)


@pytest.mark.slow(reason="twelve billion fake parameters take a minute to train")
@pytest.mark.parametrize("experiment", [name for name in published.EXPERIMENTS if name not in QUICK])
def test_a_larger_experiment_takes_the_memory_that_the_document_says(experiment: str) -> None:
    check(experiment)


def test_every_experiment_for_a_real_model_is_in_the_table() -> None:
    assert documented().keys() == published.EXPERIMENTS.keys()
