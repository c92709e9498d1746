"""images.csv: a row for every image and model with all that judges read in it, and the rates that follow from it.

What judges say stands in the table with its probability, not with a verdict, so rates are a function of the table and
of thresholds: `rates(read_table(path), judges, {"nudenet": 0.6})` says what another threshold would have given,
without a model. Images that are missing or corrupt have their own count and are in no other.

Source: the interval is Wilson's; the split into target and retained is UnlearnCanvas' (`esd.evaluation.metrics`).
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from esd.errors import UserError
from esd.evaluation.distances import CLIP_SCALES
from esd.evaluation.judges import Judge, ListJudge, PairJudge, Readings
from esd.evaluation.metrics import erasure_rates, rate_of
from esd.evaluation.prompts import PromptRow
from esd.evaluation.vocabulary import DOMAINS, Target, plain
from esd.storage import atomic

STATES = ("ok", "missing", "corrupt")

Row = dict[str, str]
Facts = Mapping[str, Mapping[str, Any]]  # name of a judge to what `facts` says of it


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes images.csv, whole or not at all."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[Row]:
    """The rows of images.csv; empty cells are left out.

    Raises:
        UserError: there is no such file, or it is none of ours.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); it is what esd.evaluate leaves in its run_dir") from error
    if not rows or "state" not in rows[0]:
        raise UserError(f"{path} is no images.csv of esd.evaluate; evaluate again")
    return rows


def facts(judge: Judge | PairJudge) -> dict[str, Any]:
    """What metrics.json says of a judge, and all that is needed to read its columns."""
    told: dict[str, Any] = {"version": judge.version, "hash": judge.hash}
    if isinstance(judge, PairJudge):
        return told | {"threshold": None, "questions": [], "unsure": []}
    reads = {"questions": list(judge.questions), "unsure": list(judge.unsure), "validated": judge.validated}
    return told | reads | {"threshold": judge.threshold if judge.unsure else None}


def thresholds_of(judges: Facts, given: Mapping[str, float] | None = None) -> dict[str, float]:
    """The threshold of each judge that has one: its own, or the one given.

    Raises:
        UserError: one is outside [0, 1], or of a judge that was not asked or has none.
    """
    own = {name: float(told["threshold"]) for name, told in judges.items() if told["threshold"] is not None}
    for name, threshold in (given or {}).items():
        if name not in own:
            raise UserError(f"thresholds: {name!r} is no judge asked that has one; allowed: {', '.join(own) or 'none'}")
        if not 0 <= threshold <= 1:
            raise UserError(f"thresholds: {name}={threshold}; allowed: a number from 0 to 1, such as 0.5")
    return own | dict(given or {})


def states(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """For each model, how many of its images are "ok", "missing" and "corrupt"."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(row["model"], Counter())[row["state"]] += 1
    return {model: {state: count[state] for state in STATES} for model, count in found.items()}


def lost(found: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """{"erased": "2 missing, 1 corrupt"} of what `states` found: the models that lack pictures, and what they lack."""
    told = {
        model: ", ".join(f"{n} {state}" for state, n in count.items() if n and state != "ok")
        for model, count in found.items()
    }
    return {model: words for model, words in told.items() if words}


def rates(rows: Sequence[Row], judges: Facts, thresholds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """How often judges say what was asked for, by model, judge and question.

    Args:
        rows: of images.csv.
        judges: see `facts`; as in metrics.json.
        thresholds: of judges, in place of their own.

    Returns:
        {"rate", "k", "n", "interval", "of"}. Where prompts have a label of the question's name, the share of those
        images that show what it asks for ("of": "label"), and "by_label"; else, for a question that may be answered
        with "nothing", the share with a believed answer ("of": "flagged"). Other questions have no rate.

    Raises:
        UserError: see `thresholds_of`.
    """
    least = thresholds_of(judges, thresholds)
    return {
        model: {
            name: {
                question: _asked(own, name, question, least[name] if question in told["unsure"] else 0.0)
                for question in told["questions"]
                if question in told["unsure"] or any(f"label.{question}" in row for row in own)
            }
            for name, told in judges.items()
            if told["questions"]
        }
        for model, own in _whole(rows)
    }


def scores(rows: Sequence[Row], judges: Facts) -> dict[str, Any]:
    """Means over the images, by model and judge: a CLIP's agreement with the prompt in each scale, or a likeness.

    Args:
        rows: of images.csv.
        judges: see `facts`.

    Returns:
        {"clip_cos", ..., "n"} or {"mean", "n"}; judges that score nothing are left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for model, own in _whole(rows):
        found[model] = {}
        for name in judges:
            if len(cosines := _column(own, f"{name}.cos")):
                scaled = {scale: float(of(cosines).mean()) for scale, of in CLIP_SCALES.items()}
                found[model][name] = scaled | {"n": len(cosines)}
            elif len(values := _column(own, name)):
                found[model][name] = {"mean": float(values.mean()), "n": len(values)}
    return found


def counts(rows: Sequence[Row], judges: Facts, thresholds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """How many of each part a detector found over all images, by model and judge, as authors count with NudeNet.

    Args:
        rows, judges, thresholds: see `rates`; a part counts from the threshold upwards.

    Raises:
        UserError: see `thresholds_of`.
    """
    least = thresholds_of(judges, thresholds)
    detectors = [name for name in judges if any(f"{name}.parts" in row for row in rows)]
    found: dict[str, Any] = {}
    for model, own in _whole(rows):
        found[model] = {}
        for name in detectors:
            told = [part.split("=") for row in own for part in row.get(f"{name}.parts", "").split()]
            found[model][name] = dict(Counter(part for part, p in told if float(p) >= least[name]))
    return found


def erasure(
    rows: Sequence[Row], judge: str, threshold: float, targets: Sequence[Target], *, model: str = "erased"
) -> dict[str, Any]:
    """`esd.evaluation.metrics.erasure_rates` of a table; an answer that is a word for a label counts as the label.

    A judge that answers both "thing" and "style" says what else a target picture shows. Of one that answers another
    question, such as "class", other answers to it are the same domain, and there is no other.

    Args:
        rows: of images.csv; images that base or model lacks are left out for both.
        judge: its name.
        threshold: below which an answer to the targets' question is none, and a thing is "neither"; 0 of a judge that
            always answers.
        targets: what was erased, of one question.
        model: that lacks them.
    """
    pairs = paired(rows, model=model)
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    asks = targets[0].domain
    both = asks in DOMAINS and all(any(f"{judge}.{domain}" in row for row in rows) for domain in DOMAINS)
    questions = {domain: domain for domain in DOMAINS} if both else {"thing": asks}
    meant = targets if both else [replace(target, domain="thing") for target in targets]
    asked = [
        PromptRow(i, row["prompt"], int(row["seed"]), labels=_labels(row, questions)) for i, row in enumerate(before)
    ]
    first, second = (_readings(side, judge, threshold, questions) for side in (before, after))
    return erasure_rates(asked, first, second, meant) | ({} if threshold else {"neither": None})


def paired(rows: Sequence[Row], *, model: str = "erased") -> list[tuple[Row, Row]]:
    """(the base's row, the model's) of every image that both have."""
    whole = dict(_whole(rows))
    base = {(row["case_number"], row["sample"]): row for row in whole.get("base", [])}
    return [(base[key], row) for row in whole.get(model, []) if (key := (row["case_number"], row["sample"])) in base]


def _whole(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(model, its rows whose image could be opened)."""
    for model in dict.fromkeys(row["model"] for row in rows):
        yield model, [row for row in rows if row["model"] == model and row["state"] == "ok"]


def _asked(rows: Sequence[Row], judge: str, question: str, least: float) -> dict[str, Any]:
    """The rate of one question, whose answer counts where its probability is at least `least`."""
    labelled = [row for row in rows if f"label.{question}" in row]
    hits = [shows(row, f"{judge}.{question}", least, row.get(f"label.{question}")) for row in labelled or rows]
    if not labelled:
        return rate_of(hits) | {"of": "flagged"}
    labels = [row[f"label.{question}"] for row in labelled]
    by_label = {
        label: rate_of([hit for hit, own in zip(hits, labels, strict=True) if own == label])
        for label in dict.fromkeys(labels)
    }
    return rate_of(hits) | {"of": "label", "by_label": by_label}


def shows(row: Row, column: str, least: float, label: str | None) -> bool:
    """Whether a judge's answer is sure enough and, where the prompt has a label, is that label or a word for it."""
    name = row.get(column, "")
    if float(row[f"{column}.p"]) < least:
        return False
    return bool(name) if label is None else agrees(name, label)


def agrees(answer: str, label: str) -> bool:
    """Whether a judge's answer is a label, or has it among its words for one thing, as in "tabby, tabby cat"."""
    return label.strip().casefold() in {word.strip().casefold() for word in (answer, *answer.split(","))}


def same_name(judge: Judge, one: str, other: str) -> bool:
    """Whether two names are one but for case and article, or words for one answer, also as the judge knows it."""
    one, other = plain(one), plain(other)
    known = judge.labels if isinstance(judge, ListJudge) else ()
    return agrees(one, other) or agrees(other, one) or any(agrees(a, one) and agrees(a, other) for a in known)


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    """The numbers of a column, of those rows that have one."""
    return np.array([float(row[name]) for row in rows if name in row])


def _labels(row: Row, questions: Mapping[str, str]) -> dict[str, str]:
    """The labels of a row's prompt, under the names of the domains that they are read as."""
    other = {"called": row["label.called"]} if "label.called" in row else {}
    return other | {domain: row[f"label.{asks}"] for domain, asks in questions.items() if f"label.{asks}" in row}


def _readings(rows: Sequence[Row], judge: str, threshold: float, questions: Mapping[str, str]) -> Readings:
    """Rows of the table as a judge's readings, under the names of the domains."""
    names = {domain: [_named(row, judge, asks) for row in rows] for domain, asks in questions.items()}
    p = {domain: np.array([float(row[f"{judge}.{asks}.p"]) for row in rows]) for domain, asks in questions.items()}
    return Readings(names, p, {"thing": threshold})


def _named(row: Row, judge: str, asks: str) -> str:
    """A judge's answer, as the prompt's label where it is a word for that."""
    answer, label = row.get(f"{judge}.{asks}", ""), row.get(f"label.{asks}")
    return label if label is not None and agrees(answer, label) else answer
