"""Run directories read back: every kind, and one clear line for what is none, not finished or damaged."""

import json
from pathlib import Path

import pytest
import yaml

from esd.errors import UserError
from esd.evaluation.rates import erasures
from esd.evaluation.runs import Base, Run, Sweep, differing_bases, read
from tests import finished


def one(path: Path) -> Run:
    found = read(path)
    assert isinstance(found, Run)
    return found


def test_a_training_run_is_read_with_its_rates_its_command_and_its_base(tmp_path: Path) -> None:
    command = "python -m esd.train 'concepts=[café]' run_dir=\"C:\\new\""
    run = one(finished.training(tmp_path / "cat", (0.95, 0.0, 200), concept="café", command=command))
    assert (run.kind, run.concepts, run.command) == ("training", ("café",), command)
    assert run.rates["target"].before == 0.95 and run.rates["target"].erased == 1.0
    assert run.rates["target"].interval == pytest.approx((0, 0.018846), abs=1e-5)
    assert run.domain == "thing" and run.base.name == "tiny" and set(run.base.prints) == {"conv.weight"}
    assert "implied" not in run.rates and not run.reason and not run.notes


def test_an_evaluation_and_attacks_are_read(tmp_path: Path) -> None:
    weights = finished.training(tmp_path / "cat") / "erased.safetensors"
    run = one(finished.evaluation(tmp_path / "eval", weights, still=1))
    assert (run.kind, run.concepts) == ("evaluation", ("cat",))
    assert run.rates["target"].shown_before == 6 and run.rates["target"].shown_after == 1
    assert run.weights == one(tmp_path / "cat").weights, "of one erasure"
    run = one(finished.attacks(tmp_path / "attacks", weights))
    assert run.kind == "attacks" and not run.rates and run.weights == weights
    (tmp_path / "attacks/config.yaml").unlink()
    assert one(tmp_path / "attacks").kind == "attacks", "as a script leaves it"
    run = one(finished.evaluation(tmp_path / "base", None))
    assert not run.rates and run.reason == "only the base was measured"


def test_pictures_that_judges_did_not_get_are_noted(tmp_path: Path) -> None:
    run = one(finished.evaluation(tmp_path / "eval", tmp_path / "w.safetensors", lost=2))
    assert run.lost == {"erased": "2 missing"} and run.notes == ("pictures that are in no rate: erased: 2 missing",)


def test_a_canvas_is_read_with_the_rates_of_every_erasure(tmp_path: Path) -> None:
    run = one(finished.grid(tmp_path / "canvas"))
    assert (run.kind, run.concepts, run.base.name) == ("canvas", ("cat",), "tiny")
    assert run.notes == ("1 of 2 erasures are done; the same command goes on",)
    settings = yaml.safe_load((tmp_path / "canvas/config.yaml").read_text())
    told = json.loads((tmp_path / "canvas/metrics.json").read_text())
    (tmp_path / "canvas/metrics.json").write_text(json.dumps(told | {"asked": {"limit": 2}}))
    finished.config(tmp_path / "canvas", settings | {"limit": 30})
    assert one(tmp_path / "canvas").notes[1].startswith("begun again with limit=30 (2 before); its figures are those")
    (found,) = erasures(run.results).values()
    assert (found["target"].before, found["target"].after, found["target"].n) == (1.0, 0.0, 2)
    assert (found["same_domain"].before, found["same_domain"].drop) == (1.0, 0.5)


def test_a_run_without_a_judge_has_the_reason(tmp_path: Path) -> None:
    run = one(finished.training(tmp_path / "cat", None))
    assert not run.rates and run.reason == "there is no judge for this model"


def test_damaged_weights_hide_nothing_else(tmp_path: Path) -> None:
    finished.training(tmp_path / "cat")
    (tmp_path / "cat/erased.safetensors").write_bytes(b"no weights")
    run = one(tmp_path / "cat")
    assert run.rates["target"].n == 200 and "missing or damaged" in run.notes[0] and run.base.name == "tiny"


def test_a_folder_of_runs_tells_of_those_that_cannot_be_read(tmp_path: Path) -> None:
    finished.training(tmp_path / "0_eta_1")
    finished.training(tmp_path / "1_eta_2")
    (tmp_path / "1_eta_2/summary.json").unlink()
    found = read(tmp_path)
    assert isinstance(found, Sweep) and len(found.runs) == 1 and "1_eta_2" in found.left[0]
    (tmp_path / "0_eta_1/summary.json").write_text("{")
    with pytest.raises(UserError, match=r"holds 2 runs, of which none can be read; the first: .*0_eta_1"):
        read(tmp_path)


def change(path: Path, name: str, value: object) -> None:
    told = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(told | {name: value}))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: (path / "summary.json").unlink(), r"not finished \(no summary.json\); finish it with: python"),
        (lambda path: (path / "summary.json").write_text("{"), r"summary.json is damaged .*run this again: python"),
        (lambda path: (path / "summary.json").write_text("[]"), "summary.json is damaged"),
        (lambda path: change(path, "target", {"before": 3, "after": 0, "n": 2}), "3 and 0 are no rates"),
        (lambda path: change(path, "target", {"n": 2}), "damaged"),
        (lambda path: change(path, "target", "all"), "damaged"),
        (lambda path: (path / "config.yaml").write_text("a: ["), "config.yaml cannot be read"),
        (lambda path: (path / "config.yaml").write_text("[]"), "holds no settings"),
        (lambda path: (path / "config.yaml").write_bytes(b"\xff"), "config.yaml cannot be read"),
        (lambda path: (path / "config.yaml").write_text("{prompts: a, images_per_prompt: 1}"), "measures nothing"),
        (lambda path: (path / "config.yaml").write_text("{other: 1}"), "no program of esd"),
        (lambda path: (path / "config.yaml").unlink(), "holds no run of esd"),
    ],
)  # fmt: skip
def test_bad_directories_are_told_in_one_line(tmp_path: Path, harm: object, told: str) -> None:
    finished.training(tmp_path / "cat")
    harm(tmp_path / "cat")  # type: ignore[operator]
    with pytest.raises(UserError, match=told) as raised:
        read(tmp_path / "cat")
    assert "\n" not in str(raised.value)


def test_paths_that_are_no_directories(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, told in (("nowhere", "does not exist"), ("file", "is a file"), (".", "holds no run of esd")):
        with pytest.raises(UserError, match=told):
            read(tmp_path / path)


def test_metrics_without_what_they_should_hold(tmp_path: Path) -> None:
    weights = finished.training(tmp_path / "cat") / "erased.safetensors"
    for make, lost in ((finished.evaluation, "rates"), (finished.attacks, "attacks")):
        path = make(tmp_path / lost, weights)
        told = json.loads((path / "metrics.json").read_text())
        (path / "metrics.json").write_text(json.dumps(told | {lost: [1]}))
        with pytest.raises(UserError, match=r"metrics.json is damaged"):
            read(path)


def test_bases_are_told_apart_by_their_weights_and_then_by_their_names(tmp_path: Path) -> None:
    runs = [one(finished.training(tmp_path / name, base=base)) for name, base in (("a", 0.0), ("b", 0.0), ("c", 0.5))]
    assert differing_bases(runs[:2]) == []
    (line,) = differing_bases(runs)
    assert line.startswith("different base models: a, b began with tiny, c with tiny")
    assert Base("a/b").same(Base("a/b", "1234")) is None and Base("a/b").same(Base("a/b")) is True
    assert Base("x", None, {"w": "1"}).same(Base("y", None, {"w": "1"})) is True, "one model in two folders"
    assert Base("x", None, {"w": "1"}).same(Base("x", None, {"v": "1"})) is True
