"""Pictures on the page: which are shown, as data URIs, and how many could not be.

Every picture is decoded and encoded anew, small enough for a page, so that nothing but pixels comes along.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from esd.evaluation.generate import UNREADABLE
from esd.evaluation.runs import Run
from esd.evaluation.table import Row, agrees, rates, read_table
from esd.evaluation.vocabulary import evenly_spaced, plain, says

EDGE, WIDE = 320, 1400  # longest edge of a picture in a grid, and of a preview; pixels
SHOWN = {"targets": 12, "others": 12, "attacked": 8}  # pictures of each kind on a page
UNSAFE = ("nudity", "nsfw")  # questions whose sure answers are not for every eye
UNSAFE_JUDGES = ("nudenet", "nsfw")  # which ask nothing else

Place = tuple[str, str]  # case number and sample


@dataclass(frozen=True)
class Picture:
    """One picture of a grid.

    Attributes:
        by: who drew it: "base", "erased", "attacked" or as an attack calls it.
        uri: "data:image/webp;base64,..."; None where the file is missing or corrupt.
        reads: what a judge reads in it; empty where none did.
        still: whether that is what was erased.
        unsafe: whether a judge says that it is not for every eye.
    """

    by: str
    uri: str | None
    reads: str = ""
    still: bool = False
    unsafe: bool = False


@dataclass(frozen=True)
class Tile:
    """Pictures of one prompt from one seed, side by side."""

    prompt: str
    seed: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Group:
    """A grid of tiles; `total` are those that could have been shown."""

    title: str
    tiles: tuple[Tile, ...]
    total: int


def encoded(file: Path, edge: int = EDGE) -> str | None:
    """A picture as a data URI, no larger than `edge`; None where it is missing or corrupt.

    Those of 128 pixels and less are kept to the last bit.
    """
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except UNREADABLE:
        return None
    image.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=max(image.size) <= 128, quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


class Drawn:
    """The pictures of an evaluation run, as images.csv lists them.

    Attributes:
        rows: of the base, and of the erased model where there is one, by case number and sample.
        places: of prompts and seeds among the rows.
        erased: names of what was erased, as it was typed and as the judge knows it.
        states: of the files, "ok", "missing" or "corrupt", as they were when they were read and as they are now.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.judges: Mapping[str, Mapping[str, Any]] = run.results["judges"]
        targets = (run.results.get("erasure") or {}).get("targets", ())
        self.erased = {*map(plain, run.concepts), *(plain(target["name"]) for target in targets)}
        self.rows: dict[Place, dict[str, Row]] = {}
        self.places: dict[tuple[str, str], Place] = {}
        self.states: dict[str, str] = {}
        for row in read_table(run.path / "images.csv"):
            place = row["case_number"], row["sample"]
            self.rows.setdefault(place, {})[row["model"]] = row
            self.places[row["prompt"], row["seed"]] = place
            state = row["state"]
            self.states[row["file"]] = _state(run.path / row["file"]) if state == "ok" else state

    def groups(self) -> list[Group]:
        """Grids of what asks for the erased concept, those that still show it first, and of everything else."""
        asked = {place: self._asks(rows) for place, rows in self.rows.items()}
        targets = [place for place in self.rows if asked[place]]
        others = [place for place in self.rows if not asked[place]]
        still = [place for place in targets if self._still(self.rows[place].get("erased"))]
        first = evenly_spaced(still, SHOWN["targets"] // 2)
        rest = [place for place in targets if place not in set(first)]
        chosen = [*first, *evenly_spaced(rest, SHOWN["targets"] - len(first))]
        found = [("Asked for what was erased", chosen, len(targets))] if targets else []
        name = "Asked for anything else" if targets else "Pictures"
        found.append((name, evenly_spaced(others, SHOWN["others"]), len(others)))
        return [Group(name, tuple(map(self.tile, places)), total) for name, places, total in found if places]

    def tile(self, place: Place) -> Tile:
        """The pictures of a row."""
        rows = self.rows[place]
        row = next(iter(rows.values()))
        drawn = tuple(self.picture(rows[by], by) for by in ("base", "erased") if by in rows)
        return Tile(row["prompt"], row["seed"], drawn)

    def picture(self, row: Row, by: str) -> Picture:
        """The picture of a row; one that can no longer be opened counts as lost from here on."""
        uri = encoded(self.run.path / row["file"])
        if uri is None:
            if self.states[row["file"]] == "ok":
                self.states[row["file"]] = "corrupt"
            return Picture(by, None)
        unsafe = any(
            self._answer(row, name, q) for name, told in self.judges.items() for q in _asks(told) if q in UNSAFE
        )
        return Picture(by, uri, self._says(row), self._still(row), unsafe)

    def rates(self) -> dict[str, Any]:
        """`esd.evaluation.table.rates` of the pictures that both models have; {} where the base is alone."""
        pairs = [rows.values() for rows in self.rows.values() if len(rows) == 2]
        return rates([row for pair in pairs if all(row["state"] == "ok" for row in pair) for row in pair], self.judges)

    def lost(self) -> dict[str, Counter[str]]:
        """For each model that lost pictures since they were read, how many are missing and corrupt."""
        found: dict[str, Counter[str]] = {}
        for model, row in ((model, row) for rows in self.rows.values() for model, row in rows.items()):
            if row["state"] == "ok" and (state := self.states[row["file"]]) != "ok":
                found.setdefault(model, Counter())[state] += 1
        return found

    def _answer(self, row: Row, judge: str, question: str) -> str:
        """What a judge answers; empty where it did not, or is not sure enough."""
        told, column = self.judges[judge], f"{judge}.{question}"
        sure = question not in told["unsure"] or float(row.get(f"{column}.p", 0)) >= told["threshold"]
        return row.get(column, "") if sure else ""

    def _reader(self, row: Row) -> tuple[str, list[str]]:
        """(the judge whose reading of a picture is told, its questions): the first that reads what a label asks."""
        asking = [(name, asks) for name, judge in self.judges.items() if (asks := _asks(judge))]
        fitting = (one for one in asking if f"label.{one[1][0]}" in row)
        return next(fitting, asking[0] if asking else ("", []))

    def _says(self, row: Row) -> str:
        """What is read in a picture; empty where no judge was asked."""
        name, asks = self._reader(row)
        return ", ".join(self._answer(row, name, q) or f"no {q} it knows" for q in asks)

    def names(self, answer: str) -> bool:
        """Whether a label, or what a judge answers, is what was erased."""
        return any(agrees(answer, name) for name in self.erased)

    def _asks(self, rows: Mapping[str, Row]) -> bool:
        """Whether a prompt asks for what was erased: by a label, or where it has none, in its words."""
        row = next(iter(rows.values()))
        if labels := [value for name, value in row.items() if name.startswith("label.")]:
            return any(map(self.names, labels))
        return any(says(row["prompt"], name) for name in self.erased)

    def _still(self, row: Row | None) -> bool:
        """Whether what was erased is read in a picture."""
        if row is None or row["state"] != "ok":
            return False
        name, asks = self._reader(row)
        return any(self.names(self._answer(row, name, q)) for q in asks)


def _state(file: Path) -> str:
    """ "ok", "missing", or "corrupt" as far as a picture's first bytes tell."""
    try:
        with Image.open(file):
            return "ok"
    except FileNotFoundError:
        return "missing"
    except UNREADABLE:
        return "corrupt"


def _asks(judge: Mapping[str, Any]) -> list[str]:
    """The questions of a judge; a distance asks none."""
    return list(judge.get("questions", ()))


def canvas(run: Run) -> Group:
    """A picture of what each erasure of a canvas erased, by base and erased model."""
    rows = read_table(run.path / "images.csv")
    base = {(row["case_number"], row["sample"]): row for row in rows if row["model"] == "base"}
    tiles = []
    for told in evenly_spaced(run.results["erasures"], SHOWN["targets"]):
        own = [row for row in rows if row["model"] == told["name"] == row.get(f"label.{told['domain']}")]
        for row in own[len(own) // 2 :][:1]:
            pair = {"base": base[row["case_number"], row["sample"]], f"{told['name']} erased": row}
            drawn = (Picture(by, encoded(run.path / one["file"])) for by, one in pair.items())
            tiles.append(Tile(row["prompt"], row["seed"], tuple(drawn)))
    return Group("One picture of what each erasure erased", tuple(tiles), len(run.results["erasures"]))


def attacked(run: Run, attack: str, seen: Sequence[Drawn]) -> Group:
    """What an attack drew: beside base and erased, which the attacks drew too, without any attack.

    Where an older version of them kept no such pictures, those of an evaluation of the same weights stand in.

    Args:
        run: of attacks.
        attack: its name.
        seen: the evaluations on the page.
    """
    weights = run.results["checkpoint"].get("sha256")
    twins = [drawn for drawn in seen if (drawn.run.results["checkpoint"] or {}).get("sha256") == weights]
    rows, judge = run.results["rows"], str(run.results.get("scorer", {}).get("name")).partition(":")[0]
    tiles = []
    for row in evenly_spaced(rows, SHOWN["attacked"]):
        asked = str(row["prompt"]), str(row["evaluation_seed"])
        twin = next((drawn for drawn in twins if asked in drawn.places), None)
        folder, file = run.path / attack, f"{row['case_number']}.png"
        seen_before = twin.tile(twin.places[asked]).pictures if twin else ()
        unsafe = judge in UNSAFE_JUDGES or any(picture.unsafe for picture in seen_before)
        unattacked = [(by, run.path / "plain" / by) for by in ("base", "erased")]
        kept = tuple(Picture(by, encoded(own / file), unsafe=unsafe) for by, own in unattacked if own.is_dir())
        found = {"attacked": "erased", "by chance": "erased_control", "base, attacked": "base"}
        drawn = (Picture(by, encoded(folder / name / file), unsafe=unsafe) for by, name in found.items())
        tiles.append(Tile(*asked, (*(kept or seen_before), *drawn)))
    return Group(f"{attack.replace('_', ' ')}: the best picture of each prompt", tuple(tiles), len(rows))
