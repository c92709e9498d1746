"""Where a run comes from and what it took, and what its judges measured besides rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esd.evaluation.runs import Run
from esd.evaluation.sweep import short
from esd.evaluation.words import percent


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) of where a run comes from and what it took, those it tells."""
    results, base = run.results, run.base
    judges = results.get("judges") or {name: one for name in ("judge", "scorer") if (one := results.get(name))}
    checkpoint = results.get("checkpoint") or {}
    took = results.get("seconds")
    found: list[tuple[str, Any]] = [
        ("directory", run.path),
        ("method", " ".join([method["name"], *method["training"]]) if (method := results.get("method")) else None),
        ("method, of styles also", " ".join(method.get("styles", ())) if method else None),
        ("base", base.name + (f" at {base.revision}" if base.revision else "")),
        ("base's weights", base.prints.get("pipeline")),
        ("checkpoint", checkpoint.get("path")),
        ("checkpoint's sha256", checkpoint.get("sha256")),
        ("size", f"{checkpoint['bytes'] / 1e6:.1f} MB" if checkpoint.get("bytes") else None),
        ("seed", results.get("seed", run.settings.get("seed"))),
        ("parameters trained", f"{results['parameters']:,}" if results.get("parameters") else None),
        ("seconds", _listed(took) if isinstance(took, dict) else took),
        ("peak memory, GiB", _listed(results["peak_gib"]) if results.get("peak_gib") else None),
        ("vocabulary", results.get("vocabulary")),
        *((_judge_name(name, one), _judge(one)) for name, one in judges.items()),
        ("budget", _listed(results["budget"]) if results.get("budget") else None),
        ("made with", run.versions or None),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _listed(values: dict[str, Any]) -> str:
    """Numbers with their names."""
    told = {
        name.replace("_", " "): round(value, 2) if isinstance(value, float) else value for name, value in values.items()
    }
    return ", ".join(f"{name} {short(value)}" for name, value in told.items())


def _judge_name(name: str, told: dict[str, Any]) -> str:
    return f"judge {told.get('name', name)}"


def _judge(told: dict[str, Any]) -> str:
    """A judge's version, threshold and hash."""
    threshold = f", threshold {short(told['threshold'])}" if told.get("threshold") is not None else ""
    return f"version {told.get('version')}{threshold}" + (f", sha256 {told['hash']}" if told.get("hash") else "")


def _rate(told: Mapping[str, Any]) -> str:
    """A rate with its interval and its n."""
    low, high = map(percent, told["interval"])
    return f"{percent(told['rate'])} ({low} to {high}, n={told['n']})"


def scores(run: Run) -> list[tuple[str, str, str]]:
    """(name, the base's, the erased model's) of what judges measure besides rates; distances are between the two."""
    results, found = run.results, []
    if (spread := results.get("distances")) and spread.get("n"):
        where = f" of {spread['n']} pairs that name nothing erased, in features of {spread['features']}"
        both = [(name, spread[name]) for name in ("fid", "kid") if spread.get(name) is not None]
        found += [(f"{name.upper()}{where}", "", f"{value:.4g}") for name, value in both]
    if "erased" not in (by_model := results["rates"]):
        asked = [(judge, *one) for judge, told in by_model.get("base", {}).items() for one in told.items()]
        found += [(f"{judge}, {question}", _rate(rate), "") for judge, question, rate in asked if rate["n"]]
    for kind, ending in (("scores", ""), ("counts", " found")):
        by_model = results.get(kind) or {}
        sides = [by_model.get(model, {}) for model in ("base", "erased")]
        for judge in results["judges"]:
            told = [side.get(judge, {}) for side in sides]
            for key in dict.fromkeys(key for one in told for key in one if key != "n"):
                values = ["" if one.get(key) is None else f"{one[key]:.4g}" for one in told]
                found.append((f"{judge}, {key}{ending}", values[0], values[1]))
    return found
