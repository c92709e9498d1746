"""Finished run directories, written as the programs write them: small, and with the rates that a test asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from esd import checkpoint
from esd.evaluation import canvas, reading, table
from esd.evaluation.generate import Drawn, Manifest
from esd.evaluation.judges import Readings
from esd.evaluation.metrics import wilson
from esd.evaluation.vocabulary import Target

COMMAND = "python -m esd.train concepts=[cat]"
KEPT = {"same_domain": (0.95, 0.94, 100), "cross_domain": (0.98, 0.97, 100), "target_style": (1.0, 0.98, 50)}
DISTANCES = {"fid": 1.5, "kid": None, "n": 6, "features": "colours 1"}
STYLES = ("neon", "mosaic")


class Colours:
    """Reads a thing from red, a style from green, how sure it is of the thing from blue, and nudity from pure red."""

    name, version, hash, threshold, validated = "colours", "1", "ab" * 32, 0.5, "anything"
    questions: tuple[str, ...] = ("thing", "style")
    unsure: tuple[str, ...] = ("thing",)
    size: int | None = None

    def __call__(self, images: np.ndarray) -> Readings:
        colour = images[:, 0, 0] / 255.0
        things = ["cat" if red > 0.5 else "dog" for red in colour[:, 0]]
        styles = [STYLES[int(green > 0.5)] for green in colour[:, 1]]
        return Readings({"thing": things, "style": styles}, {"thing": colour[:, 2], "style": np.ones(len(images))})


class Nudity(Colours):
    """Flags what is red."""

    name, questions, unsure = "nudenet", ("nudity",), ("nudity",)

    def __call__(self, images: np.ndarray) -> Readings:
        red = images[:, 0, 0, 0] / 255.0
        parts = [[("EXPOSED", one)] if one > 0.9 else [] for one in red.tolist()]
        return Readings({"nudity": ["EXPOSED" if one else "" for one in parts]}, {"nudity": red}, parts=parts)


def rate(before: float, after: float, n: int) -> dict[str, Any]:
    """A rate as summary.json has it."""
    k, base = round(after * n), round(before * n)
    return {
        "before": base / n,
        "after": k / n,
        "n": n,
        "interval": wilson(k, n),
        "interval_before": wilson(base, n),
    }


def config(folder: Path, settings: Mapping[str, Any], command: str = COMMAND) -> None:
    """Writes config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    head = "# " + command.encode("unicode_escape").decode() + "\n# esd 0.1.0, python 3.11.7\n"
    (folder / "config.yaml").write_text(head + yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")


def training(
    folder: Path,
    target: tuple[float, float, int] | None = (0.95, 0.0, 200),
    kept: Mapping[str, tuple[float, float, int]] = KEPT,
    *,
    concept: str = "cat",
    eta: float = 1.0,
    selection: str = "esd_x",
    seed: int = 0,
    base: float = 0.0,
    command: str = COMMAND,
) -> Path:
    """A training run; without a target it has no rates, as a model without a judge gives none."""
    settings = {
        "concepts": [concept],
        "selection": selection,
        "run_dir": str(folder),
        "seed": seed,
        "model": {"path": "tiny", "revision": None},
        "objective": {"eta": eta},
        "training": {"updates": 3},
    }
    config(folder, settings, command)
    rates = {name: rate(*counts) for name, counts in {"target": target, **kept}.items() if counts} if target else {}
    facts = {"neither": 0.5 if target else None, "seconds": 1.5, "parameters": 12, "seed": seed, "judge": None}
    told = rates | facts | {"reason": None if target else "there is no judge for this model"}
    (folder / "summary.json").write_text(json.dumps(told), encoding="utf-8")
    steps = [{"step": i, "loss": 1 / i, "loss_erase": 1 / i, "loss_preserve": 0.1} for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 4, "lo')
    Image.new("RGB", (300, 40), "teal").save(folder / "preview.png")
    tensors = {"conv.weight": torch.full((3,), base)}
    told_of = {"fingerprint": checkpoint.fingerprint(tensors), "concepts": [concept], "base": "tiny"}
    checkpoint.save(folder / "erased.safetensors", {"conv.weight": torch.ones(3)}, told_of)
    return folder


def evaluation(
    folder: Path,
    weights: Path | None,
    *,
    concept: str = "cat",
    still: int = 1,
    images: int = 12,
    nudity: bool = False,
    lost: int = 0,
    seed: int = 0,
    own_seeds: bool = True,
) -> Path:
    """An evaluation: half of the prompts ask for a cat, of which the erased model draws `still`; dogs stay.

    Args:
        folder: to write.
        weights: the checkpoint that was measured, or None for the base alone.
        concept: what was erased.
        still: cats that it draws.
        images: prompts.
        nudity: whether a second judge reads it, which flags every cat.
        lost: dogs of the erased model whose pictures are missing.
        seed: the run's setting.
        own_seeds: whether each prompt brings its seed, so that the setting changes no picture.
    """
    asked = [("cat" if i % 2 == 0 else "dog", STYLES[i // 2 % 2]) for i in range(images)]
    plans = {}
    for model in ("base", "erased") if weights else ("base",):
        (folder / model).mkdir(parents=True)
        drawn = []
        for i, (thing, style) in enumerate(asked):
            red = thing == "cat" and (model == "base" or i // 2 < still)
            colour = (255 * red, 255 * (style == "mosaic"), 200)
            Image.new("RGB", (8, 8), colour).save(folder / model / f"{i}_0.png")
            prompt = f"a {thing} in the {style} style"
            place = i if own_seeds else 8 * seed + i  # settings that follow each other share four pictures
            drawn.append(Drawn(f"{i}_0.png", i, 0, prompt, place, 4.0, {"thing": thing, "style": style}))
            if model == "erased" and thing == "dog" and i // 2 < lost:
                (folder / model / f"{i}_0.png").unlink()
        plans[model] = Manifest(folder / model, {}, None, None, 2, tuple(drawn))
    judges = [Colours(), *([Nudity()] if nudity else [])]
    table.write_table(
        folder / "images.csv", [row for name, plan in plans.items() for row in reading.read(name, plan, judges)]
    )
    settings = {
        "prompts": "p.csv",
        "checkpoint": str(weights),
        "judges": [],
        "suite": {"name": "prompts"},
        "seed": seed,
    }
    config(folder, settings, "python -m esd.evaluate")
    measure(folder, weights, concept, {judge.name: table.facts(judge) for judge in judges})
    return folder


def measure(folder: Path, weights: Path | None, concept: str, judges: Mapping[str, Any]) -> None:
    """Writes metrics.json from images.csv."""
    rows = table.read_table(folder / "images.csv")
    targets = [Target("thing", "cat")]
    found = {"judge": "colours", "targets": [asdict(target) for target in targets]}
    erasure = found | table.erasure(rows, "colours", 0.5, targets) if weights else None
    told = {
        "suite": "prompts",
        "base": {"name": "tiny", "revision": None, "fingerprint": "cd" * 32},
        "checkpoint": weights and {"path": str(weights), "sha256": "ef" * 32, "bytes": 12, "concepts": [concept]},
        "judges": judges,
        "images": table.states(rows),
        "rates": table.rates(rows, judges),
        "scores": table.scores(rows, judges),
        "counts": table.counts(rows, judges),
        **({"erasure": erasure, "reason": None, "distances": DISTANCES} if weights else {}),
        "denoiser": {"erased": {"prompts": ["cat"], "points": [{"t": 1.0, "residual": 0.5, "drift": 1.0, "n": 1}]}},
        "seconds": {"drawing": 1.0},
        "peak_gib": {"process": 0.5},
    }
    (folder / "metrics.json").write_text(json.dumps(told), encoding="utf-8")


def grid(folder: Path, planned: int = 2) -> Path:
    """A canvas of cats and dogs in two styles, of which "cat" was erased: half of the dogs went too."""
    judge = Colours()
    settings = {"judges": [], "suite": {"name": "emoji_canvas"}, "model": {"path": "tiny"}}
    config(folder, settings, "python -m esd.evaluate suite=emoji_canvas")
    rows = canvas.grid("a {thing} in the {style} style", ["cat", "dog"], STYLES, seed=0, samples=1)
    sides: dict[str, list[table.Row]] = {}
    for model, place in (("base", "base"), ("cat", "cat/erased")):
        (folder / place).mkdir(parents=True)
        drawn = []
        for row in rows:
            thing, style = row.labels["thing"], row.labels["style"]
            shown = thing if model == "base" else "dog" if (thing, style) != ("dog", "neon") else "cat"
            file = f"{row.case_number}_0.png"
            colour = (255 * (shown == "cat"), 255 * (style == "mosaic"), 200)
            Image.new("RGB", (8, 8), colour).save(folder / place / file)
            drawn.append(Drawn(file, row.case_number, 0, row.prompt, row.case_number, 4.0, dict(row.labels)))
        read = reading.read(model, Manifest(folder / place, {}, None, None, 2, tuple(drawn)), [judge])
        sides[model] = [told | {"file": f"{place}/{Path(told['file']).name}"} for told in read]
    table.write_table(folder / "images.csv", [row for side in sides.values() for row in side])
    before, after = (canvas.counted(side, judge.name) for side in sides.values())
    scores = canvas.scores(Target("thing", "cat"), before, after)
    erasure = {
        "name": "cat",
        "domain": "thing",
        **scores,
        "fid": 1.0,
        "kid": None,
        "retention": [{"name": "dog", "similarity": 0.4, "before": 1.0, "after": 0.5, "n": 2}],
        "over_erasure": 0.5,
        "seconds": 1.0,
        "peak_gib": {"process": 0.5},
        "parameters": 12,
        "bytes": 480_000,
    }
    metrics = {
        "suite": "emoji_canvas",
        "method": {"name": "esd_u", "training": ["selection=esd_u"]},
        "judges": {judge.name: table.facts(judge)},
        "planned": planned,
        "images": table.states([row for side in sides.values() for row in side]),
        "erasures": [erasure],
        "means": {"thing": canvas.mean([scores])},
        "published": canvas.PUBLISHED,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def attacks(
    folder: Path, weights: Path, shown: Sequence[int] = (0, 2, 11), n: int = 12, *, plain: bool = False
) -> Path:
    """A soft prompt that draws the concept for so many of n prompts after each try, and its control for none.

    Args:
        folder: to write.
        weights: the checkpoint under attack.
        shown: prompts for which it is drawn, after each try.
        n: prompts.
        plain: whether the pictures without an attack are there too, which older versions did not keep.
    """

    def points(counts: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "tried": {"updates": 10 * i} if i else {},
                "gradients": 4 * i,
                "queries": 20 * (i + 1),
                "cost": 20 * (i + 1) + 8 * i,
                "best": {"k": k, "n": n},
                "alone": {"k": k, "n": n},
            }
            for i, k in enumerate(counts)
        ]

    chance, base = [0] * len(shown), [n] * len(shown)
    curves = {"erased": shown, "erased_control": chance, "base": base, "base_control": base}
    rows = [
        {"case_number": i, "prompt": f"a cat in the {STYLES[i // 2 % 2]} style", "evaluation_seed": i} for i in range(n)
    ]
    asked = {"judges": [], "suite": {"name": "attacks", "attacks": ["soft_prompt", "noise"]}}
    config(folder, asked, "python -m esd.evaluate suite=attacks")
    for kind in (*(f"soft_prompt/{run}" for run in curves), *(("plain/base", "plain/erased") if plain else ())):
        (folder / kind).mkdir(parents=True)
        for row in rows:
            Image.new("RGB", (8, 8), "olive").save(folder / kind / f"{row['case_number']}.png")
    told = {
        "suite": "attacks",
        "base": {"name": "tiny", "revision": None, "fingerprint": "cd" * 32},
        "checkpoint": {"path": str(weights), "sha256": "ef" * 32, "concepts": ["cat"]},
        "scorer": {"name": "colours", "version": "1", "threshold": 0.5, "hash": "ab"},
        "budget": {"gradients": 100, "queries": None, "seconds": None},
        "seed": 0,
        "rows": rows,
        "attacks": {
            "soft_prompt": {
                "settings": {},
                "reads": "best",
                "curves": {run: {"stopped": "queries=60", "points": points(counts)} for run, counts in curves.items()},
            }
        },
    }
    (folder / "metrics.json").write_text(json.dumps(told), encoding="utf-8")
    return folder
