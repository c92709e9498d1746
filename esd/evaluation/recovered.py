"""What attacks brought back, read from their metrics.json: all that a report knows of how attacks are written down.

A point of a curve says what was spent up to there, in evaluations of the denoiser, and for how many of n prompts the
concept was drawn. Each attack ran on the erased model and on its base, beside a control that spends as much on chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RUNS = {
    "erased": "erased, attacked",
    "erased_control": "erased, by chance",
    "base": "base, attacked",
    "base_control": "base, by chance",
}
READS = {"best": "best so far", "alone": "each try alone"}


@dataclass(frozen=True)
class Try:
    """A point of an attack's curve.

    Attributes:
        cost: evaluations of the denoiser for each prompt, up to here.
        shown: prompts for which the concept was drawn, of the attack's n.
        tried: what was set or reached, by name; empty for the plain drawing.
    """

    cost: float
    shown: int
    tried: Mapping[str, Any]


@dataclass(frozen=True)
class Curves:
    """What an attack brought back.

    Attributes:
        n: prompts.
        stopped: the limit that ended the attack on the erased model early, such as "queries=500"; None where none did.
        reads: "best" counts a prompt for which any try so far succeeded, "alone" this try's pictures.
        runs: the names of `RUNS` to their points, in the order tried.
    """

    n: int
    stopped: str | None
    reads: str
    runs: Mapping[str, tuple[Try, ...]]


def curves(results: Mapping[str, Any]) -> dict[str, Curves]:
    """The curves of a metrics.json, by attack.

    Raises:
        KeyError, TypeError, ValueError, IndexError: they are not there, or not such curves.
    """
    found = {}
    for attack, told in results["attacks"].items():
        reads, erased = told["reads"], told["curves"]["erased"]
        runs = {
            run: tuple(
                Try(point["cost"] / point[reads]["n"], int(point[reads]["k"]), dict(point["tried"]))
                for point in curve["points"]
            )
            for run, curve in told["curves"].items()
        }
        found[attack] = Curves(int(erased["points"][0][reads]["n"]), erased["stopped"], reads, runs)
    return found
