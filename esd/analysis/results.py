"""What an analysis leaves: tables, figures with captions, and what took long to compute.

    NAME.csv        a table
    NAME.png        a figure
    captions.md     every figure with what is seen in it
    kept/NAME.npy   what took long; the same call reads it instead of computing it again
    facts.json      what was looked into and how, so that nothing kept is taken for another model's or other settings'

Every file is whole or absent. A folder that was refused, or of which nothing came, holds none of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from esd.errors import UserError
from esd.evaluation.table import write_table
from esd.storage import atomic, write_json

DPI = 130
WHERE = ("name", "path", "revision")  # of facts: where something lay, for people; what it is the others say


class Results:
    """A folder of results.

    Args:
        folder: made where it does not exist.
        report: gets the name of each figure once it is there.
    """

    def __init__(self, folder: str | Path, report: Callable[[str], object] = lambda _: None) -> None:
        self.folder, self.report = Path(folder), report
        self.captions: dict[str, str] = {}
        self.tables: list[str] = []
        self.notes: list[str] = []
        self._facts: dict[str, Any] | None = None  # to be written with the first result

    def hold(self, facts: Mapping[str, Any]) -> None:
        """Says what is looked into, and how; those of results that are there must be the same.

        Args:
            facts: as JSON holds them: a dictionary or None for each. Names and paths may differ: what a hash knows
                again may have moved. So may what either side does not tell.

        Raises:
            UserError: the folder holds results of something else, or nobody knows of what.
        """
        file = self.folder / "facts.json"
        if (self.folder / "kept").is_dir() and not file.is_file():
            raise UserError(
                f"run_dir={self.folder} holds results, and no facts.json that says of what; choose another run_dir, or "
                "remove that directory"
            )
        wanted = json.loads(json.dumps(facts))
        there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name in [name for name in wanted if name in there]:
            before, now = there[name] or {}, wanted[name] or {}
            told = [key for key in before if key in now] if before and now else [*before, *now]
            differing = [key for key in told if key not in WHERE and before.get(key) != now.get(key)]
            if differing:
                lay, key = before.get("name") or before.get("path"), differing[0]
                other = f"other {name}" if name.endswith("s") else f"another {name}"
                raise UserError(
                    f"run_dir={self.folder} holds results of {other}{f', {lay}' if lay else ''} ({key} is "
                    f"{before.get(key)} there, {now.get(key)} here); choose another run_dir, or remove that directory"
                )
        self._facts = there | wanted

    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` returned when it was first called for this name; it is not called again."""
        file = self.folder / "kept" / f"{name}.npy"
        if not file.is_file():
            made = make()
            self._told_facts()
            with atomic(file) as staged, staged.open("wb") as out:
                np.save(out, made, allow_pickle=False)
        loaded: np.ndarray = np.load(file, allow_pickle=False)
        return loaded

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows of equal columns as NAME.csv; numbers with six digits, None as nothing."""
        self._told_facts()
        write_table(self.folder / f"{name}.csv", [{key: _cell(value) for key, value in row.items()} for row in rows])
        self.tables.append(name)

    def figure(self, name: str, figure: Figure, caption: str) -> None:
        """Writes NAME.png and its caption.

        Args:
            name: of the figure.
            figure: as those of `esd.analysis.figures`.
            caption: what is seen, with its numbers, worked out from what the figure shows.
        """
        self._told_facts()
        with atomic(self.folder / f"{name}.png") as staged:
            figure.savefig(staged, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
        self.captions[name] = " ".join(caption.split())
        self._write_captions()
        self.report(f"{name}.png")

    def note(self, text: str) -> None:
        """Adds a line that the program prints at its end, and captions.md holds after the figures."""
        self.notes.append(text)
        self._write_captions()

    def _write_captions(self) -> None:
        self._told_facts()
        parts = [f"## {name}\n\n![{name}]({name}.png)\n\n{text}\n" for name, text in self.captions.items()]
        with atomic(self.folder / "captions.md") as staged:
            staged.write_text("\n".join([*parts, *(f"{text}\n" for text in self.notes)]), encoding="utf-8")

    def told(self) -> str:
        """Where the results are, in a line."""
        figures = ", ".join(f"{name}.png" for name in self.captions)
        tables = ", ".join(f"{name}.csv" for name in self.tables)
        return f"{self.folder}: captions.md; {figures}; {tables}"

    def _told_facts(self) -> None:
        """Writes facts.json before anything else is."""
        if self._facts is not None:
            write_json(self.folder / "facts.json", self._facts)
            self._facts = None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
