"""The field's prompt sets by name: read from the user's own copy, and known by their hash.

`prompts=esd_vangogh:path/to/vangogh_prompts.csv` is the same set wherever the file came from, because its sha256 must
be that of a copy that the field measures on: a name in a table means the same rows for everybody. None of them is
passed on here; `promptsets.csv` says of each which repository has it, at which commit, in which file, and its licence
where that is plain. I2P, Ring-A-Bell and P4D hold text that is meant to shock.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from esd.errors import UserError
from esd.evaluation.prompts import PromptRow, load

FILE = Path(__file__).with_suffix(".csv")
EMPTY = {"i2p": (2260,)}  # case numbers without a prompt, which would be drawn as "" or, by way of pandas, as "nan"


@dataclass(frozen=True)
class Copy:
    """A file that holds a set.

    Attributes:
        name: of the set.
        repository: OWNER/NAME on GitHub.
        commit: 40 hex digits.
        file: its path there.
        sha256: of the file, as git stores it.
        licence: of the repository; "" where it says none for its prompts.
        label: COLUMN=VALUE of what every prompt of the file shows, where it has no column that says so; or "".
    """

    name: str
    repository: str
    commit: str
    file: str
    sha256: str
    licence: str
    label: str = ""

    def __str__(self) -> str:
        return f"{self.file} of github.com/{self.repository} at {self.commit[:7]}"


@cache
def known() -> Mapping[str, tuple[Copy, ...]]:
    """The copies of each set, by its name."""
    copies: dict[str, tuple[Copy, ...]] = {}
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            copies[row["name"]] = (*copies.get(row["name"], ()), Copy(**row))
    return copies


def find(
    source: str | Sequence[Any],
    *,
    seed: int = 0,
    samples: int = 1,
    guidance: float | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[PromptRow], list[str]]:
    """The rows of a setting, and what to say of them.

    Args:
        source: a list of prompts, the path of a file, or NAME:PATH of a set and the user's copy of it.
        seed, samples, guidance, names: see `esd.evaluation.prompts.load`.

    Raises:
        UserError: no set has that name, the file is not the set of that name, or see `esd.evaluation.prompts.load`.
    """
    how: Any = {"seed": seed, "samples": samples, "guidance": guidance}
    if not isinstance(source, str):
        return load(source, **how, names=names), []
    name, colon, path = source.partition(":")
    if colon and name in known():
        return _copied(name, Path(path).expanduser(), how)
    if name in known():
        raise UserError(f"prompts={name} does not come with esd; get {known()[name][0]}, and say prompts={name}:PATH")
    if not Path(source).suffix and not Path(source).exists():
        raise UserError(
            f"prompts={source}: no set has that name; allowed: NAME:PATH with one of {', '.join(known())}, a .csv or "
            ".jsonl file, or a list such as prompts='[a cat]'"
        )
    return load(source, **how, names=names), []


def _copied(name: str, path: Path, how: Mapping[str, Any]) -> tuple[list[PromptRow], list[str]]:
    """The rows of a set from a user's copy, without empty ones and those that repeat another, and what was left out.

    Args:
        name: of the set.
        path: of the copy.
        how: it is read, see `esd.evaluation.prompts.load`.

    Raises:
        UserError: there is no such file, or it is another than the field's.
    """
    copies = {copy.sha256: copy for copy in known()[name]}
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"prompts={name}:{path} cannot be read ({error.strerror}); get {known()[name][0]}") from error
    if found not in copies:
        raise UserError(
            f"prompts={name}:{path} has sha256 {found[:12]}..., and {name} is one of "
            f"{', '.join(f'{digest[:12]}... ({copy})' for digest, copy in copies.items())}; get that file, or give "
            f"yours without '{name}:'"
        )
    rows = load(path, **how, without=EMPTY.get(name, ()), once=True)
    if copies[found].label:
        column, _, value = copies[found].label.partition("=")
        rows = [replace(row, labels={**row.labels, column: value}) for row in rows]
    with path.open(newline="", encoding="utf-8") as file:
        left_out = sum(1 for _ in csv.DictReader(file)) - len(rows)
    told = f"{name}: {len(rows)} prompts, {copies[found]}"
    return rows, [told + (f"; left out: {left_out} rows, empty or the same as another" if left_out else "")]
