"""`python -m esd.compare`: runs side by side, bounds with exit code 3, mistakes with 2."""

import json
from pathlib import Path

import pytest

from tests import finished
from tests.programs import Command


@pytest.fixture
def runs(command: Command) -> Path:
    """`cat` is gone at little cost; `dog` is not gone, and the rest suffered; `eval` measures the cat again."""
    finished.training(command.folder / "cat", (0.95, 0.0, 200))
    finished.training(
        command.folder / "dog",
        (0.9, 0.3, 100),
        {"same_domain": (0.95, 0.8, 100), "cross_domain": (0.9, 0.9, 100)},
        seed=1,
    )
    finished.evaluation(command.folder / "eval", command.folder / "cat/erased.safetensors", still=1)
    return command.folder


def test_runs_stand_side_by_side_and_seeds_are_counted_together(command: Command, runs: Path) -> None:
    ended = command("compare", "cat", "dog", "eval")
    assert ended.code == 0
    head, *rows = ended.out.splitlines()
    assert head.split()[:3] == ["run", "UA", "target"] and "others of its kind" in head
    assert rows[0].split()[:5] == ["cat", "100%", "95%", "→", "0%"] and "0% to 1.9%, n=200" in rows[1]
    assert rows[2].split()[:5] == ["dog", "70%", "90%", "→", "30%"]
    assert rows[4].split()[:8] == ["2", "seeds", "together", "90%", "93.3%", "→", "10%", "95%"] and "n=300" in rows[5]
    assert rows[6].split()[:5] == ["eval", "83%", "100%", "→", "17%"] and "n=6" in rows[7]
    assert not ended.err


@pytest.mark.parametrize(
    ("bounds", "missed"),
    [
        (["--min-ua", "0.7", "--max-drop", "0.15"], []),
        (["--min-ua", "0.71"], ["dog: UA is 70%, under 71%"]),
        (["--max-drop", "0.14"], ["dog: others of its kind fell from 95% to 80%, by more than 14 points"]),
        (
            ["--min-ua", "1", "--max-drop", "0"],
            ["dog: UA", "cat: others", "dog: others", "cat: the other", "cat: style"],
        ),
    ],
)
def test_a_missed_bound_is_exit_code_3(command: Command, runs: Path, bounds: list[str], missed: list[str]) -> None:
    ended = command("compare", "cat", "dog", *bounds)
    assert ended.code == (3 if missed else 0)
    assert len([line for line in ended.err.splitlines() if line.startswith("missed")]) == len(missed)
    assert all(told in ended.err for told in missed)


def test_a_bound_that_is_met_to_the_last_bit_is_met(command: Command) -> None:
    for tenth in range(1, 10):
        finished.training(
            command.folder / f"{tenth}", (1.0, 1 - tenth / 10, 10), {"same_domain": (1.0, 1 - tenth / 10, 10)}
        )
        ended = command("compare", f"{tenth}", "--min-ua", f"{tenth / 10}", "--max-drop", f"{tenth / 10}")
        assert ended.code == 0, ended.err


@pytest.mark.parametrize("kept", [{}, {"target_style": (1.0, 1.0, 50)}])
def test_a_drop_that_nothing_was_measured_for_is_no_drop_of_nothing(
    command: Command, kept: dict[str, tuple[float, float, int]]
) -> None:
    finished.training(command.folder / "cat", (0.95, 0.0, 200), kept)
    ended = command("compare", "cat", "--min-ua", "0.95", "--max-drop", "0")
    assert ended.code == 2 and not ended.out and "cat drew no prompt that names nothing erased" in ended.err
    assert command("compare", "cat", "--min-ua", "0.95").code == 0
    finished.training(command.folder / "dog", (0.95, 0.0, 200), kept | {"cross_domain": (0.9, 0.9, 50)})
    assert command("compare", "dog", "--max-drop", "0").code == 0, "one of the two kinds is enough"


def test_a_run_that_lacks_pictures_is_warned_of_and_held_to_nothing(command: Command) -> None:
    finished.evaluation(command.folder / "eval", command.folder / "w.safetensors", still=0, lost=6)
    ended = command("compare", "eval")
    assert ended.code == 0 and "warning: eval: pictures that are in no rate: erased: 6 missing" in ended.err
    for bound in (["--min-ua", "0.9"], ["--max-drop", "0.5"]):
        ended = command("compare", "eval", *bound)
        assert ended.code == 2 and not ended.out and "eval lacks pictures (of the erased model 6 missing)" in ended.err
        assert "python -m esd.evaluate" in ended.err, "how to draw them"


def test_a_folder_with_an_unfinished_run_is_held_to_nothing(command: Command) -> None:
    for number in range(3):
        finished.training(command.folder / f"sweep/{number}_eta_{number}", eta=number)
    (command.folder / "sweep/1_eta_1/summary.json").unlink()
    ended = command("compare", "sweep")
    assert ended.code == 0 and "warning: sweep/1_eta_1 is a run of training that is not finished" in ended.err
    ended = command("compare", "sweep", "--min-ua", "0.95")
    assert ended.code == 2 and not ended.out and "1 of 3 runs in sweep cannot be held to it" in ended.err
    assert f"finish it with: {finished.COMMAND}" in ended.err


def test_pictures_that_two_runs_share_are_not_counted_twice(command: Command) -> None:
    weights = command.folder / "w.safetensors"
    for name, seed, own in (("one", 0, True), ("same", 1, True), ("other", 2, False)):
        finished.evaluation(command.folder / name, weights, seed=seed, own_seeds=own)
    ended = command("compare", "one", "same")
    assert "together" not in ended.out and "same drew pictures that one or another run of its setting has" in ended.err
    ended = command("compare", "one", "same", "other")
    assert "2 seeds together" in ended.out and "n=12" in ended.out and "n=18" not in ended.out
    finished.evaluation(command.folder / "between", weights, seed=1, own_seeds=False)
    ended = command("compare", "one", "between", "other")
    assert "2 seeds together" in ended.out and ended.err.count("count") == ended.err.count("between drew") == 1
    for name in ("cat", "copy"):
        finished.training(command.folder / name)
    assert "together" not in command("compare", "cat", "copy").out, "one training, twice"


def test_json_has_every_figure(command: Command, runs: Path) -> None:
    ended = command("compare", "cat", "dog", "--json", "--min-ua", "0.95")
    assert ended.code == 3
    cat, dog = json.loads(ended.out)
    assert cat["ua"] == 1.0 and cat["missed"] == [] and len(dog["missed"]) == 1
    assert dog["rates"]["same_domain"]["drop"] == pytest.approx(0.15) and dog["rates"]["same_domain"]["n"] == 100
    assert dog["largest_drop"]["of"] == "same_domain" and len(dog["ua_interval"]) == 2
    low, high = dog["ua_interval"]
    assert low < dog["ua"] < high


def test_a_folder_of_runs_counts_for_its_runs(command: Command, runs: Path) -> None:
    finished.training(runs / "sweep/0_eta_1", eta=1.0)
    finished.training(runs / "sweep/1_eta_2", eta=2.0)
    (runs / "sweep/1_eta_2/summary.json").unlink()
    ended = command("compare", "sweep", "sweep/0_eta_1")
    assert ended.code == 0 and ended.out.count("0_eta_1") == 1 and "1_eta_2 is a run of training" in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cat", "--min-ua", "1.5"], "--min-ua 1.5: allowed: 0 to 1"),
        (["cat", "--max-drop", "-0.1"], "--max-drop -0.1: allowed: 0 to 1"),
        (["cat", "--min-ua", "nan"], "--min-ua nan: allowed"),
        (["cat", "--min-ua", "most"], "invalid float value: 'most'"),
        ([], "required: run"),
        (["nowhere"], "nowhere does not exist"),
        (["cat", "none"], "none has no rate of what was erased (there is no judge for this model)"),
        (["attacks"], "attacks has no rate of what was erased (attacks are told as curves)"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_print_no_table(
    command: Command, runs: Path, arguments: list[str], told: str
) -> None:
    finished.training(runs / "none", None)
    finished.attacks(runs / "attacks", runs / "cat/erased.safetensors")
    ended = command("compare", *arguments)
    assert ended.code == 2 and told in ended.err and not ended.out
