"""Files of the recipe: room for them, written whole or not at all, and told apart by what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20


class Refused(SystemExit):
    """A stage cannot go on: the message names what is wrong and the mend."""


def need(folder: Path, count: int) -> None:
    """Make the folder, and refuse to begin in it with less than `count` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < count:
        raise Refused(
            f"{folder} has {free / MIB:,.1f} MiB free, less than the {count / MIB:,.1f} MiB needed; make room"
        )


def made_by(script: str, path: Path) -> Path:
    """Return the path, or refuse because `script`, which makes it, has not been run."""
    if not path.exists():
        raise Refused(f"there is no {path.name} in {path.parent}; run {script} first (or give the right --data)")
    return path


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield where to write a file that becomes `target` once it is written, and is removed if it is not."""
    partial = target.with_name(f"part.{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        remove(partial)


@contextmanager
def whole_folders(staged: Path, target: Path) -> Iterator[Path]:
    """Yield an empty folder; what is written in it then replaces its namesakes in `target`: all of it or nothing.

    `staged` is a folder of the caller's own; it is there only meanwhile.
    """
    remove(staged)
    new, old = staged / "new", staged / "old"
    for folder in (new, old, target):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        _exchange(sorted(new.iterdir()), old, target)
    finally:
        remove(staged)


def _exchange(arrivals: Iterable[Path], old: Path, target: Path) -> None:
    """Move arrivals into `target` and their namesakes aside into `old`; put these back if one cannot be moved."""
    begun: list[str] = []
    try:
        for path in arrivals:
            final = target / path.name
            if final.exists():
                shutil.move(final, old / path.name)
            begun.append(path.name)
            shutil.move(path, final)
    except BaseException:
        for name in begun:
            remove(target / name)
            if (old / name).exists():
                shutil.move(old / name, target / name)
        raise


def folder_digest(folder: Path) -> str:
    """Return what tells a published part from another: the hash of its weights, or of a tokenizer's words."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        words = json.loads((folder / "tokenizer.json").read_text())["model"]
        return digest([json.dumps([words["vocab"], words["merges"]], sort_keys=True).encode()])
    scale = json.loads((folder / "config.json").read_text()).get("scaling_factor")
    return digest([*(file.read_bytes() for file in weights), json.dumps(scale).encode()])


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of bytes, one after the other."""
    told = hashlib.sha256()
    for part in parts:
        told.update(part)
    return told.hexdigest()
