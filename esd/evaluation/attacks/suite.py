"""All attacks that were asked for against one checkpoint: run one after the other, saved as they go.

    metrics.json                        what was attacked and how, and every attack's curves
    recovery.png                        the curves
    NAME.png                            pictures of the first rows, in all four runs
    NAME/RUN/CASE_NUMBER.png            of each row the first picture that shows the concept, or the nearest to it
    plain/MODEL/CASE_NUMBER.png         of each row what base and erased model draw without any attack

An attack that is in metrics.json already is not run again, so the same call resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esd import checkpoint
from esd.checkpoint import Erased
from esd.errors import UserError
from esd.evaluation.attacks.attack import Attack
from esd.evaluation.attacks.budget import Budget
from esd.evaluation.attacks.figure import draw_recovery
from esd.evaluation.attacks.recovery import Recovery
from esd.evaluation.attacks.scorer import Scorer
from esd.evaluation.attacks.subject import Model
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.generate import base_of, prints
from esd.evaluation.preview import Row, draw
from esd.evaluation.prompts import PromptRow
from esd.evaluation.recovered import RUNS
from esd.families import Family
from esd.storage import atomic, write_json

COLUMNS = 8  # rows that NAME.png shows


def attack_checkpoint(
    family: Family,
    erased: Erased,
    attacks: Sequence[Attack],
    rows: Sequence[PromptRow],
    budget: Budget,
    *,
    scorer: Scorer,
    draw_settings: DrawSettings,
    folder: Path,
    seed: int = 0,
    versions: Mapping[str, str] | None = None,
    claim: AbstractContextManager[Any] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs every attack, and returns what metrics.json then holds.

    Args:
        family: of the base; it is the base again afterwards, on the CPU.
        erased: the weights under attack.
        attacks: each of another name.
        rows: see `Attack.run`.
        budget: of each attack on each model.
        scorer: looks for the concept.
        draw_settings: see `Attack.run`.
        folder: gets all that is listed above.
        seed: of the attacks' own draws.
        versions: for provenance.
        claim: entered once nothing is left to refuse, before anything is written, and left at the end.
        report: gets a line for each attack.

    Raises:
        UserError: an attack does not fit, the weights are of another base, the folder holds attacks of other weights or
            settings, all before anything is written; see `Attack.run`.
    """
    if not attacks or len({attack.name for attack in attacks}) < len(attacks):
        raise UserError(f"attacks are {[a.name for a in attacks]}; allowed: one or more, each name once")
    for attack in attacks:
        attack.refuse(family, rows, draw_settings, budget)
    checkpoint.check(family.pipe, erased)
    file, facts = folder / "metrics.json", _facts(family, erased, rows, budget, scorer, draw_settings, seed)
    _begun(file, facts, attacks)
    concepts = ", ".join(erased.provenance.get("concepts", ())) or erased.path.name
    with claim or nullcontext(), checkpoint.erased(family.pipe, erased):
        metrics = _begun(file, facts, attacks) | {"versions": dict(versions or {})}
        model = Model.wearing(family)
        for attack in attacks:
            if attack.name in metrics["attacks"]:
                report(f"{attack.name}: done already")
                continue
            found = attack.run(model, rows, budget, scorer=scorer, draw=draw_settings, seed=seed)
            _save_pictures(folder, attack.name, found, rows, f"{concepts} erased, {attack.name}")
            metrics["attacks"][attack.name] = found.told()
            write_json(file, metrics)
            report(summary(attack.name, metrics["attacks"][attack.name]))
        draw_recovery(folder / "recovery.png", metrics["attacks"], f"{concepts} erased: what attacks bring back")
    return metrics


def summary(name: str, told: Mapping[str, Any]) -> str:
    """One attack in a line: the rate at its end beside what it began with, its control's and the base's, and the cost.

    Args:
        name: of the attack.
        told: see `Recovery.told`.
    """

    def end(run: str) -> str:
        last = told["curves"][run]["points"][-1][told["reads"]]
        return f"{last['k']}/{last['n']}"

    first, last = (told["curves"]["erased"]["points"][i] for i in (0, -1))
    plain = f"{first['alone']['k']}/{first['alone']['n']}"
    return (
        f"{name}: erased {plain} -> {end('erased')} (by chance {end('erased_control')}), base {end('base')} (by chance "
        f"{end('base_control')}); {last['gradients']} gradients, {last['queries']} queries, {last['seconds']:.0f} s"
    )


def _facts(
    family: Family,
    erased: Erased,
    rows: Sequence[PromptRow],
    budget: Budget,
    scorer: Scorer,
    draw_settings: DrawSettings,
    seed: int,
) -> dict[str, Any]:
    """What was attacked and how, whichever the attack; as JSON has it."""
    told = {
        "suite": "attacks",
        "base": base_of(family),
        "checkpoint": erased.identity(),
        "rows": [{**asdict(row), "labels": dict(row.labels)} for row in rows],
        "scorer": {key: getattr(scorer, key) for key in ("name", "version", "threshold", "hash")},
        "draw": {"num_steps": draw_settings.num_steps, "guidance_scale": draw_settings.guidance_scale},
        "budget": asdict(budget),
        "seed": seed,
        "cut": family.cut([row.prompt for row in rows]),
    }
    return json.loads(json.dumps(told))


def _begun(file: Path, facts: dict[str, Any], attacks: Sequence[Attack]) -> dict[str, Any]:
    """The metrics that are there, or new ones without any attack.

    Raises:
        UserError: those that are there are of other facts, or of other settings of an attack.
    """
    if not file.exists():
        return facts | {"attacks": {}}
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        pairs = [(name, there[name], fact) for name, fact in facts.items() if name != "base"]
        pairs.append(("base", prints(there["base"]), prints(facts["base"])))
        pairs += [
            (f"suite.settings.{attack.name}", told["settings"], json.loads(json.dumps(attack.settings)))
            for attack in attacks
            if (told := there["attacks"].get(attack.name))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no result of attacks ({error!r}); choose another run_dir") from error
    if other := next((found for pair in pairs if (found := _differing(*pair))), None):
        name, before, now = other
        raise UserError(
            f"{file.parent} holds other attacks ({name} is {before!r} there, {now!r} here); choose another run_dir"
        )
    return there


def _differing(name: str, there: Any, here: Any) -> tuple[str, Any, Any] | None:
    """(name, value there, value here) of the first field in which two values of JSON differ; None where they do not."""
    if isinstance(there, dict) and isinstance(here, dict):
        fields = [(f"{name}.{key}", there.get(key), here.get(key)) for key in dict.fromkeys([*there, *here])]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        fields = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(there, here, strict=True))]
    elif isinstance(there, list) and isinstance(here, list):
        return f"the number of {name}", len(there), len(here)
    else:
        return None if there == here else (name, there, here)
    return next((found for field in fields if (found := _differing(*field))), None)


def columns(rows: Sequence[PromptRow]) -> list[str]:
    """What tells the rows apart: the labels that they do not share, or else the prompts."""
    varying = {label for row in rows for label in row.labels if row.labels[label] != rows[0].labels.get(label)}
    told = [", ".join(row.labels[label] for label in sorted(varying & set(row.labels))) for row in rows]
    return told if varying else [row.prompt for row in rows]


def _save_pictures(folder: Path, name: str, found: Recovery, rows: Sequence[PromptRow], title: str) -> None:
    """Writes NAME/RUN/CASE_NUMBER.png, NAME.png, and plain/MODEL/CASE_NUMBER.png, which every attack draws alike."""
    kinds = {Path(name, run): curve.images for run, curve in found.curves.items()}
    kinds |= {Path("plain", model): found.curves[model].plain for model in ("base", "erased")}
    for kind, images in kinds.items():
        for row, image in zip(rows, images, strict=True):
            with atomic(folder / kind / f"{row.case_number}.png") as staged:
                Image.fromarray(image).save(staged, format="PNG")
    draw(
        folder / f"{name}.png",
        [Row(RUNS[run], "", curve.images[:COLUMNS, np.newaxis]) for run, curve in found.curves.items()],
        columns(rows)[:COLUMNS],
        title=title,
        versions=("",),
    )
