"""Real models by their published configurations: every experiment takes the memory that the documents say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from esd import memory
from esd.config.train import TrainConfig
from esd.launch import mixed_precision
from esd.memory import GB, RESERVE, Memory
from esd.train import make_plan
from tests import published
from tests.programs import composed

ROOT = Path(__file__).resolve().parents[1]
PHASES = "Real models"  # the heading of the table of phases
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


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading of one of the documents, without its head."""
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"## {heading}")[1].split("\n## ")[0]
    return [row.strip("|").split("|") for row in re.findall(r"^\|.*\|$", section, re.M)][2:]


def documented() -> dict[str, list[float]]:
    """Experiment to GB of each phase, from docs/memory.md."""
    return {
        experiment.strip(" `"): [float(cell) for cell in cells] for experiment, *cells in table("memory.md", PHASES)
    }


def cards() -> dict[str, float]:
    """Experiment to GB of a card, from docs/families.md."""
    rows = table("families.md", "One command each")
    return {command.split("experiment=")[1].split()[0]: float(size.split()[0]) for _, command, _, size in rows}


def promised(experiment: str) -> list[float]:
    """GB of a card in the file of an experiment, and in README.md where it is named there."""
    readme = re.findall(f"`experiment={experiment}` .*", (ROOT / "README.md").read_text(encoding="utf-8"))
    texts = [(ROOT / f"conf/experiment/{experiment}.yaml").read_text(encoding="utf-8").replace("\n#", ""), *readme]
    return [float(size) for text in texts for size in re.findall(r"[Pp]lanned at ([\d.]+) GB of a GPU", text)]


def check(experiment: str) -> None:
    found = [phase.total / GB for phase in planned(experiment).phases]
    assert found == pytest.approx(documented()[experiment], abs=0.06), [round(size, 1) for size in found]
    assert max(found) + RESERVE == pytest.approx(cards()[experiment], abs=0.06)


@pytest.mark.parametrize("experiment", QUICK)
def test_an_experiment_takes_the_memory_that_the_document_says(experiment: str) -> None:
    check(experiment)


@pytest.mark.slow(reason="twelve billion fake parameters take a minute to train")
@pytest.mark.parametrize("experiment", [name for name in published.EXPERIMENTS if name not in QUICK])
def test_a_larger_experiment_takes_the_memory_that_the_document_says(experiment: str) -> None:
    check(experiment)


def test_every_experiment_for_a_real_model_is_in_both_tables_and_promises_the_same_card() -> None:
    assert documented().keys() == published.EXPERIMENTS.keys() == cards().keys()
    for experiment, card in cards().items():
        assert card == pytest.approx(max(documented()[experiment]) + RESERVE, abs=0.11), experiment
        said = promised(experiment)
        assert said and all(card <= size < card + 1 for size in said), (experiment, said)  # rounded up
