"""The figures of docs/attacks.md: attacks on an erasure of the bundled model, small enough for a processor.

    python scripts/attacks.py CHECKPOINT CONCEPT OUT ATTACK...

such as `python scripts/attacks.py runs/cat cat runs/attacks/cat soft_prompt completion`. Prints a row of the page's
table for each try, and leaves recovery.json, the best pictures and a sheet of them in OUT/ATTACK.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

import esd
from esd.evaluation import attacks
from esd.evaluation.attacks import Budget, ConceptScorer, Curve, Model, Rate
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.judges import load_judge
from esd.evaluation.preview import Row, draw
from esd.evaluation.prompts import PromptRow, say
from esd.evaluation.vocabulary import OTHER, Target, Vocabulary
from esd.families import family_of, load_pipeline
from esd.run import versions

MODEL = "checkpoints/emoji-sd"
FIRST_SEED = 2_000_000  # neither training nor the evaluation of a run has these
DRAW = DrawSettings(num_steps=10, guidance_scale=4.0, batch_size=32)


def settings(name: str, concept: str) -> dict:
    """Smaller than the defaults, which are for models of 512 pixels and a GPU."""
    return {
        "soft_prompt": {"tokens": 2, "steps": 100, "every": 50, "lr": 5e-2},
        "completion": {"interrupts": (1, 2, 3, 5)},
        "inpainting": {},
        "noise": {"etas": (1.0, 1.4, 1.85), "scales": (1.04,)},
        "inversion": {"concept": concept, "steps": 100, "every": 100, "lr": 5e-3},
    }[name]


def prompts(vocabulary: Vocabulary, target: Target, count: int = 16) -> list[PromptRow]:
    """The concept in a held-out phrasing with things or styles spread over the vocabulary."""
    other = OTHER[target.domain]
    names = vocabulary.names(other)
    template = vocabulary.phrasings["held_out"]["both"][0]
    chosen = [{target.domain: target.name, other: names[i * len(names) // count]} for i in range(count)]
    return [PromptRow(i, say(template, labels), FIRST_SEED + i, labels=labels) for i, labels in enumerate(chosen)]


def cell(rate: Rate) -> str:
    """k of n and the interval."""
    low, high = rate.interval
    return f"{rate.k} of {rate.n} ({low:.0%} to {high:.0%})"


def beside(curve: Curve, number: int, cost: int, reads: str) -> str:
    """What a control reads beside a try: the same try of a hint, or the best of a search at no more than its cost."""
    points = [p for p in curve.points if p.queries <= cost] if reads == "best" else curve.points[number : number + 1]
    return cell(getattr(points[-1], reads)) if points else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("concept")
    parser.add_argument("out", type=Path)
    parser.add_argument("attack", nargs="+")
    asked = parser.parse_args()
    vocabulary, judge = Vocabulary.load(MODEL), load_judge(MODEL)
    assert vocabulary is not None and judge is not None
    (target,) = vocabulary.targets([asked.concept])
    rows = prompts(vocabulary, target)
    pipe = load_pipeline(MODEL, torch.bfloat16)
    esd.apply(pipe, asked.checkpoint)
    for name in asked.attack:
        attack = attacks.find(name)(**settings(name, asked.concept))
        found = attack.run(
            Model.wearing(family_of(pipe)), rows, Budget(), scorer=ConceptScorer(judge, target), draw=DRAW,
            versions=versions(),
        )  # fmt: skip
        folder, curves = asked.out / name, found.curves
        found.save(folder)
        print("| try | gradients | queries | erased | its control | base | its control |")
        print("|---|---|---|---|---|---|---|")
        for number, point in enumerate(curves["erased"].points):
            cost = point.queries + 2 * point.gradients
            cells = [
                ", ".join(f"{key} {value:.3g}" for key, value in point.tried.items()) or "plain",
                str(point.gradients),
                str(point.queries),
                cell(getattr(point, attack.reads)),
                beside(curves["erased_control"], number, cost, attack.reads),
                cell(getattr(curves["base"].points[number], attack.reads)),
                beside(curves["base_control"], number, cost, attack.reads),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
        draw(
            folder / "best.png",
            [Row(key.replace("_", ", "), "", curve.images[:, np.newaxis]) for key, curve in curves.items()],
            [row.labels[OTHER[target.domain]] for row in rows],
            title=f"{target.name} erased, attack {name}: the best picture of each prompt",
            versions=("",),
        )


if __name__ == "__main__":
    main()
