"""Finished runs, read back: what a run directory of any kind holds, as plain values.

A training run has `summary.json`, an evaluation `metrics.json` and `images.csv`, a canvas these of many erasures,
attacks `metrics.json` with their curves, and a folder of runs is a sweep. What is no run, not finished or damaged is
refused with what to do about it. No model is loaded, and nothing is written.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from safetensors import SafetensorError, safe_open

from esd.checkpoint import FILE_NAME
from esd.errors import UserError
from esd.evaluation import foretold, recovered, table
from esd.evaluation.rates import Rate, erasures, read_rates, ways

Kind = Literal["training", "evaluation", "canvas", "attacks"]

RESULTS = {kind: "summary.json" if kind == "training" else "metrics.json" for kind in get_args(Kind)}
SUITES: dict[Any, Kind] = {"emoji_canvas": "canvas", "attacks": "attacks"}  # all others are evaluations
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError)


@dataclass(frozen=True)
class Base:
    """What a run says of the model it began with.

    Attributes:
        name: a hub name, or a folder.
        revision: a commit on the hub, or None.
        prints: values that identify weights, by what they are of: tensors' names, or "pipeline" for all.
    """

    name: str
    revision: str | None = None
    prints: Mapping[str, str] = field(default_factory=dict)

    def same(self, other: Base) -> bool | None:
        """Whether two runs began with the same model; None where what they say does not tell."""
        shared = self.prints.keys() & other.prints.keys()
        if shared:
            return all(self.prints[name] == other.prints[name] for name in shared)
        return True if (self.name, self.revision) == (other.name, other.revision) else None


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: its directory, as it was given.
        kind: which program left it.
        command: that made it, from config.yaml; empty where there is none.
        versions: it was made with, as config.yaml says.
        settings: config.yaml.
        concepts: what was erased.
        base: see `Base`.
        rates: by the names of `TITLES`, those that were measured.
        reason: why there are no rates; empty where there are.
        results: summary.json or metrics.json as it stands.
        notes: what is missing or damaged, but hides nothing else.
    """

    path: Path
    kind: Kind
    command: str
    versions: str
    settings: Mapping[str, Any]
    concepts: tuple[str, ...]
    base: Base
    rates: Mapping[str, Rate]
    reason: str
    results: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.resolve().name

    @property
    def lost(self) -> dict[str, str]:
        """The models of which pictures were missing or corrupt when judges read them, and how many."""
        return table.lost(self.results.get("images") or {})

    @property
    def weights(self) -> Path:
        """The file of erased weights that the run made or measured; one of its own where it measured the base alone."""
        told = self.results.get("checkpoint") or {}
        return Path(told["path"] if told else self.path / FILE_NAME).resolve()

    @property
    def domain(self) -> str | None:
        """What was erased, "thing" or "style"; None where that does not follow from the rates."""
        others = {name.rpartition("_")[2] for name in self.rates if name.startswith(("target_", "elsewhere_"))}
        return {"style": "thing", "thing": "style"}[others.pop()] if len(others) == 1 else None


@dataclass(frozen=True)
class Sweep:
    """A folder of runs.

    Attributes:
        path: of the folder.
        runs: those that are finished, by name.
        left: what is wrong with each of the others, in a line.
    """

    path: Path
    runs: tuple[Run, ...]
    left: tuple[str, ...]


def read(path: Path) -> Run | Sweep:
    """What a directory holds.

    Raises:
        UserError: there is no such directory; it holds no run; its run is not finished, measured nothing, or is
            damaged.
    """
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; give the run_dir of a finished run")
    if (path / "config.yaml").is_file() or (path / "metrics.json").is_file():
        return _run(path)
    inside = sorted(file.parent for file in path.glob("*/config.yaml"))
    if not inside:
        raise UserError(
            f"{path} holds no run of esd (no config.yaml, nor folders with one); give the run_dir of esd.train or "
            "esd.evaluate, or the folder of a --multirun"
        )
    runs, left = [], []
    for folder in sorted(inside, key=_numbered):
        try:
            runs.append(_run(folder))
        except UserError as error:
            left.append(str(error))
    if not runs:
        raise UserError(f"{path} holds {len(left)} runs, of which none can be read; the first: {left[0]}")
    return Sweep(path, tuple(runs), tuple(left))


def _numbered(folder: Path) -> tuple[bool, int, str]:
    """Sorts the jobs of a sweep, "10_eta_2" after "2_eta_1", and other names after them."""
    number = folder.name.partition("_")[0]
    return not number.isdigit(), int(number) if number.isdigit() else 0, folder.name


def _run(path: Path) -> Run:
    """The run in a directory; see `read`."""
    settings, command, versions = _config(path)
    kind = _kind(path, settings)
    file = path / RESULTS[kind]
    if not file.is_file():
        again = f"finish it with: {command}" if command else "run it again"
        raise UserError(f"{path} is a run of {kind} that is not finished (no {file.name}); {again}")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise TypeError("no object")
        told = {"training": _training, "evaluation": _evaluation, "canvas": _canvas, "attacks": _attacks}[kind]
        run = Run(path, kind, command, versions, settings, results=results, **told(path, settings, results))
        if run.lost:
            lost = "; ".join(f"{model}: {words}" for model, words in run.lost.items())
            run = replace(run, notes=(*run.notes, f"pictures that are in no rate: {lost}"))
        return run
    except (OSError, *DAMAGE) as error:
        again = f"; remove that file, and run this again: {command}" if command else "; make it again"
        raise UserError(f"{file} is damaged ({error!r}){again}") from error


def _config(path: Path) -> tuple[dict[str, Any], str, str]:
    """(settings, command, versions) of config.yaml; empty where there is none, as scripts leave it.

    Raises:
        UserError: it cannot be read.
    """
    file = path / "config.yaml"
    if not file.is_file():
        return {}, "", ""
    try:
        text = file.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); restore it") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds no settings; restore it, or run again in another run_dir")
    command, versions = ([line[2:] for line in text.splitlines() if line.startswith("# ")] + ["", ""])[:2]
    return settings, _unescaped(command), versions


def _unescaped(line: str) -> str:
    """A command as it was typed: config.yaml holds it in ASCII, on one line."""
    try:
        return codecs.decode(line, "unicode_escape")
    except UnicodeDecodeError:
        return line


def _kind(path: Path, settings: Mapping[str, Any]) -> Kind:
    """Which program left a directory.

    Raises:
        UserError: one that measures nothing, or none of ours.
    """
    if "concepts" in settings and "training" in settings:
        return "training"
    if not settings or "judges" in settings:
        return SUITES.get(_suite(path, settings), "evaluation")
    if "images_per_prompt" in settings:
        raise UserError(
            f"{path} is a run of esd.generate, which measures nothing; esd.evaluate draws the same and has it read"
        )
    raise UserError(
        f"{path}/config.yaml is of no program of esd that measures; give a run of esd.train or esd.evaluate"
    )


def _suite(path: Path, settings: Mapping[str, Any]) -> Any:
    """The suite of an evaluation, as its settings name it, or where there are none its results."""
    if isinstance(suite := settings.get("suite"), Mapping):
        return suite.get("name")
    try:
        return json.loads((path / RESULTS["attacks"]).read_text(encoding="utf-8"))["suite"]
    except (OSError, *DAMAGE):
        return None


def _training(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What a training run says of its concepts, its base and its rates."""
    told = settings["model"]
    base, notes = Base(str(told["path"]), told.get("revision")), []
    try:
        with safe_open(path / FILE_NAME, framework="numpy") as file:
            provenance = json.loads(file.metadata()["provenance"])
        prints = {name: f"{one['dtype']} {one['values']}" for name, one in provenance["fingerprint"].items()}
        base = Base(provenance["base"], provenance.get("revision"), prints)
    except (OSError, SafetensorError, *DAMAGE):
        notes.append(f"{FILE_NAME} is missing or damaged: what the run erased can be seen here, but no longer used")
    return {
        "concepts": tuple(map(str, settings["concepts"])),
        "base": base,
        "rates": read_rates(results),
        "reason": str(results.get("reason") or ""),
        "notes": tuple(notes),
    }


def _evaluation(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation says of its checkpoint's concepts, its base and its rates."""
    if not isinstance(results["judges"], dict) or not isinstance(results["rates"], dict):
        raise TypeError("judges and rates are no tables")
    rates = read_rates(results.get("erasure") or {})
    ways(results)  # whether they can be told is found out here
    if other := _asked_otherwise(settings, results):
        raise UserError(
            f"{path} was begun again with {other}, and is not finished; its figures are those of before: the same "
            "command goes on"
        )
    reason = results.get("reason") if results["checkpoint"] else "only the base was measured"
    return _measured(results) | {"rates": rates, "reason": str(reason or "")}


def _canvas(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What a canvas says of its concepts and its base; its erasures are read by `erasures`."""
    done, planned, base = len(erasures(results)), results["planned"], Base(str(settings["model"]["path"]))
    foretold.foretold_by_kind(results["erasures"])  # whether it can be told is found out here
    if (manifest := path / "base" / "manifest.json").is_file():
        base = _base(json.loads(manifest.read_text(encoding="utf-8"))["base"])
    left = f"{done} of {planned} erasures are done; the same command goes on"
    other = _asked_otherwise(settings, results)
    again = f"begun again with {other}; its figures are those of before, and the same command goes on"
    return {
        "concepts": tuple(erasure["name"] for erasure in results["erasures"]),
        "base": base,
        "rates": {},
        "reason": "a canvas is of many erasures",
        "notes": tuple(line for line, holds in ((left, done < planned), (again, other)) if holds),
    }


def _asked_otherwise(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What a run was begun again with since its results were written, in words; empty where nothing differs."""
    asked = results.get("asked") or {}
    told = {name: (settings.get(name), value) for name, value in asked.items() if settings}
    return ", ".join(
        f"{name}={json.dumps(now)} ({json.dumps(before)} before)"
        for name, (now, before) in told.items()
        if now != before
    )


def erased_in_turn(runs: Sequence[Run]) -> list[Mapping[str, Any]]:
    """Every erasure of the canvases among some runs, as metrics.json tells them."""
    return [told for run in runs if run.kind == "canvas" for told in run.results["erasures"]]


def _attacks(path: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What attacks say of the concepts and the base under attack; their curves are read by `recovered`."""
    done, asked = recovered.curves(results), settings.get("suite", {}).get("attacks", ())
    left = ", ".join(name for name in asked if name not in done)
    notes = (f"{left}: not done; the same command goes on",) if left else ()
    return _measured(results) | {"rates": {}, "reason": "attacks are told as curves", "notes": notes}


def _measured(results: Mapping[str, Any]) -> dict[str, Any]:
    """Concepts and base, as metrics.json names them."""
    checkpoint = results["checkpoint"] or {}
    return {"concepts": tuple(map(str, checkpoint.get("concepts") or ())), "base": _base(results["base"])}


def _base(told: Mapping[str, Any]) -> Base:
    """A base as manifests name it."""
    prints = {"pipeline": told["fingerprint"]} if told.get("fingerprint") else {}
    return Base(told["name"], told.get("revision"), prints)


def differing_bases(runs: Sequence[Run]) -> list[str]:
    """A line for each base besides the first run's: it is another, or whether it is one cannot be told."""
    kinds: list[tuple[Base, list[str]]] = []
    for run in runs:
        known = next((names for base, names in kinds if base.same(run.base)), None)
        if known is None:
            kinds.append((run.base, [run.name]))
        else:
            known.append(run.name)
    told = []
    for base, names in kinds[1:]:
        (first, others), sure = kinds[0], kinds[0][0].same(base) is False
        pair = f"{_few(others)} began with {_called(first)}, {_few(names)} with {_called(base)}"
        why = "their rates are of different models" if sure else "nothing that both hold tells whether they are one"
        told.append(f"{'different' if sure else 'perhaps different'} base models: {pair}; {why}")
    return told


def _few(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _called(base: Base) -> str:
    """How a base is named, with its commit and the first digits of what identifies it."""
    whole = base.prints.get("pipeline", "")
    return base.name + (f" at {base.revision}" if base.revision else "") + (f" ({whole[:12]})" if whole else "")
