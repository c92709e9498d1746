"""A list of attacks for a checkpoint: saved as it goes, resumed, and drawn."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esd import checkpoint
from esd.errors import UserError
from esd.evaluation.attacks import Budget, Completion, NoiseProbe
from esd.evaluation.attacks.figure import BASE, ERASED, draw_recovery
from esd.evaluation.attacks.suite import attack_checkpoint, columns
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.generate import sample
from esd.evaluation.prompts import PromptRow
from esd.evaluation.recovered import RUNS
from esd.families import family_of
from tests import families, tiny

ROWS = [PromptRow(3, "a cat", 11, labels={"thing": "cat"}), PromptRow(7, "the cat in mosaic style", 12)]
ATTACKS = [NoiseProbe(etas=(1.85,), scales=(1.0,)), Completion(interrupts=(1,))]


class Redness:
    """Scores a picture by its red channel, and counts the pictures."""

    name, version, threshold, hash = "redness", "1", 0.5, "none"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.seen += len(images)
        return images[..., 0].mean((1, 2)) / 255


class Blueness(Redness):
    name = "blueness"


@pytest.fixture(scope="module")
def family() -> Any:
    return family_of(tiny.every("sd1"))


@pytest.fixture(scope="module")
def erased(family: Any, tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Erased:
    return families.erased(family, tmp_path_factory.mktemp("erased") / "erased.safetensors", "to_k")


def run(family: Any, erased: Any, folder: Path, attacks: Any = ATTACKS, budget: Any = None, **how: Any) -> Any:
    settings = {"scorer": Redness(), "draw_settings": DrawSettings(2, 3.0, 4), "folder": folder, **how}
    rows = settings.pop("rows", ROWS)
    return attack_checkpoint(family, erased, attacks, rows, budget or Budget(), **settings)


def test_results_say_where_they_come_from_and_pictures_stand_beside_them(
    family: Any, erased: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    metrics = run(family, erased, tmp_path, budget=Budget(queries=500), versions={"esd": "1"}, seed=4)
    assert all(torch.equal(before[key], value) for key, value in family.denoiser.state_dict().items())
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["suite"] == "attacks" and metrics["seed"] == 4 and metrics["versions"] == {"esd": "1"}
    assert metrics["budget"] == {"gradients": None, "queries": 500, "seconds": None}
    assert metrics["scorer"] == {"name": "redness", "version": "1", "threshold": 0.5, "hash": "none"}
    assert metrics["checkpoint"]["concepts"] == ["cat"] and len(metrics["checkpoint"]["sha256"]) == 64
    assert [row["evaluation_seed"] for row in metrics["rows"]] == [11, 12]
    assert metrics["attacks"]["noise"]["settings"] == {"etas": [1.85], "scales": [1.0]}
    for name, told in metrics["attacks"].items():
        assert set(told["curves"]) == set(RUNS)
        for one in RUNS:
            assert sorted(path.name for path in (tmp_path / name / one).iterdir()) == ["3.png", "7.png"]
        assert Image.open(tmp_path / f"{name}.png").width > 200
    for model, pipe in (("base", nullcontext()), ("erased", checkpoint.erased(family.pipe, erased))):
        with pipe:
            drawn = sample(family.pipe, [row.prompt for row in ROWS], [row.evaluation_seed for row in ROWS],
                           num_steps=2, guidance_scale=3.0, batch_size=2)  # fmt: skip
        for row, picture in zip(ROWS, drawn, strict=True):
            plain = np.asarray(Image.open(tmp_path / "plain" / model / f"{row.case_number}.png")).astype(int)
            assert np.abs(plain - picture).max() <= 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["noise", "completion"] and "by chance" in lines[0]


def test_what_is_there_is_not_attacked_again(family: Any, erased: Any, tmp_path: Path) -> None:
    once = run(family, erased, tmp_path, ATTACKS[:1])
    written = (tmp_path / "noise" / "base" / "3.png").stat().st_mtime_ns
    elsewhere = once | {"base": once["base"] | {"name": "/another/machine/base", "revision": "main"}}
    (tmp_path / "metrics.json").write_text(json.dumps(elsewhere))
    scorer, lines = Redness(), list[str]()
    both = run(family, erased, tmp_path, scorer=scorer, report=lines.append, draw_settings=DrawSettings(2, 3.0, 1))
    assert both["attacks"]["noise"] == once["attacks"]["noise"] and lines[0] == "noise: done already"
    assert (tmp_path / "noise" / "base" / "3.png").stat().st_mtime_ns == written
    assert scorer.seen == 4 * 2 * len(ROWS)  # four runs of completion: the plain drawing and one try
    (tmp_path / "metrics.json").write_text(json.dumps(once | {"base": once["base"] | {"weights": "other"}}))
    with pytest.raises(UserError, match=r"base\.weights is 'other' there"):
        run(family, erased, tmp_path, ATTACKS[:1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"seed": 5}, r"other attacks \(seed is 0 there, 5 here\)"),
        ({"budget": Budget(queries=99)}, "budget.queries is None there, 99 here"),
        ({"rows": ROWS[:1]}, "the number of rows is 2 there, 1 here"),
        (
            {"rows": [ROWS[0], PromptRow(7, "the dog in mosaic style", 12)], "scorer": Blueness()},
            r"rows\[1\].prompt is 'the cat in mosaic style' there, 'the dog in mosaic style' here",
        ),
        ({"scorer": Blueness()}, "scorer.name is 'redness' there, 'blueness' here"),
        (
            {"attacks": [NoiseProbe(etas=(1.0,), scales=(1.0,))]},
            r"suite.settings.noise.etas\[0\] is 1.85 there, 1.0 here",
        ),
    ],
)
def test_a_folder_of_other_attacks_is_refused(
    family: Any, erased: Any, tmp_path_factory: pytest.TempPathFactory, how: Any, message: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "refused"
    if not folder.exists():
        run(family, erased, folder, ATTACKS[:1])
    with pytest.raises(UserError, match=message):
        run(family, erased, folder, **{"attacks": ATTACKS[:1], **how})


def test_an_attack_that_does_not_fit_is_refused_before_any_is_run(family: Any, erased: Any, tmp_path: Path) -> None:
    for attacks in ([ATTACKS[0], Completion(interrupts=(9,))], [], [ATTACKS[0], ATTACKS[0]]):
        with pytest.raises(UserError, match="allowed"):
            run(family, erased, tmp_path, attacks)
    with pytest.raises(UserError, match="queries=11 ends before the first 2 pictures are drawn, which takes 12"):
        run(family, erased, tmp_path, budget=Budget(queries=11))  # PNDM makes 3 steps of 2, each with guidance
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="no result of attacks"):
        run(family, erased, tmp_path)


def test_the_figure_shows_every_curve_at_its_height(tmp_path: Path) -> None:
    def points(*rates: float) -> dict[str, Any]:
        told = [{"rate": rate, "k": 0, "n": 10, "interval": [rate, rate]} for rate in rates]
        return {
            "points": [
                {"cost": 100 * i, "tried": {"interrupt": i} if i else {}, "alone": one, "best": one}
                for i, one in enumerate(told)
            ]
        }

    curves = {"erased": points(0, 1), "erased_control": points(0, 0), "base": points(1, 1), "base_control": points(1)}
    draw_recovery(tmp_path / "one.png", {"completion": {"reads": "alone", "curves": curves}}, "cat erased")
    draw_recovery(tmp_path / "four.png", {f"a{i}": {"reads": "best", "curves": curves} for i in range(4)}, "cat erased")
    one, four = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("one", "four"))
    assert four.shape[0] > one.shape[0]

    def rows_of(colour: tuple[int, int, int]) -> np.ndarray:
        axes = one[220:, 130:800]  # below the legend, right of the labels
        return np.unique(np.nonzero((np.abs(axes.astype(int) - colour) < 6).all(-1))[0])

    erased, base = rows_of(ERASED), rows_of(BASE)
    assert np.ptp(erased) > 400 and np.ptp(base) < 40  # from 0 to 100%, against 100% throughout


def test_columns_say_in_what_the_prompts_differ() -> None:
    labels = [{"thing": "cat", "style": "neon"}, {"thing": "cat"}, {"thing": "cat", "style": "mosaic"}]
    assert columns([PromptRow(i, "a cat", i, labels=one) for i, one in enumerate(labels)]) == ["neon", "", "mosaic"]
    assert columns([PromptRow(i, f"cat {i}", i, labels={"thing": "cat"}) for i in range(2)]) == ["cat 0", "cat 1"]
