"""What the programs of the recipe share: how they leave and tell how far they are, and files.

Files: room for them, written whole or not at all, and told apart by what they hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

MIB = 2**20
Item = TypeVar("Item")


class Refused(SystemExit):
    """A stage cannot go on: the message names what is wrong and the mend."""


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read a program's command line; from then on SIGTERM leaves as an error does, so that nothing stays half-done."""
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return args


def counted(items: Sequence[Item], what: str, seconds: float = 20) -> Iterator[Item]:
    """Yield items; print every so often how many are done and how long the rest will take."""
    begun = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - printed >= seconds:
            left = (now - begun) / done * (len(items) - done)
            print(f"{what}: {done} of {len(items)}, {left / 60:.1f} min left", flush=True)
            printed = now
        yield item


def need(folder: Path, count: int) -> None:
    """Make the folder, and refuse to begin in it with less than `count` bytes free."""
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < count:
        raise Refused(
            f"{folder} has {free / MIB:,.1f} MiB free, less than the {count / MIB:,.1f} MiB needed; make room"
        )


def made_by(script: str, path: Path) -> Path:
    """Return the path, or refuse because `script`, which makes it, has not been run."""
    if not there(path):
        raise Refused(f"there is no {path.name} in {path.parent}; run {script} first (or give the right --data)")
    return path


def there(path: Path) -> bool:
    """Return whether there is a file, or a folder that holds something."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def arrays(path: Path, script: str, names: Collection[str]) -> dict[str, np.ndarray]:
    """Return arrays of an archive; refuse one that is damaged or lacks them."""
    try:
        with np.load(made_by(script, path)) as stored:
            return {name: stored[name] for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError) as error:
        raise Refused(f"{path} is damaged or of an older make ({error}); run {script} again") from error


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
    _clear(staged, target)  # of a run that was killed
    new, old = staged / "new", staged / "old"
    for folder in (new, old, target):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        _exchange(sorted(new.iterdir()), old, target)
        old.rename(staged / "replaced")  # and so no longer to be put back
    finally:
        _clear(staged, target)


def _exchange(arrivals: Iterable[Path], old: Path, target: Path) -> None:
    """Move arrivals into `target` and their namesakes aside into `old`; leave no arrival if one cannot be moved."""
    begun: list[Path] = []
    try:
        for path in arrivals:
            final = target / path.name
            if final.exists():
                shutil.move(final, old / path.name)
            begun.append(final)
            shutil.move(path, final)
    except BaseException:
        for final in begun:
            remove(final)
        raise


def _clear(staged: Path, target: Path) -> None:
    """Remove `staged`; first put back what an exchange that did not end has set aside in it."""
    for path in sorted((staged / "old").glob("*")):
        remove(target / path.name)
        shutil.move(path, target / path.name)
    remove(staged)


def folder_digest(folder: Path) -> str:
    """Return what tells a published part from another: the hash of its weights, or of a tokenizer's words."""
    weights = sorted(folder.glob("*.safetensors"))
    try:
        if not weights:
            words = json.loads((folder / "tokenizer.json").read_text())["model"]
            return digest([json.dumps([words["vocab"], words["merges"]], sort_keys=True).encode()])
        scale = json.loads((folder / "config.json").read_text()).get("scaling_factor")
        return digest([*(file.read_bytes() for file in weights), json.dumps(scale).encode()])
    except FileNotFoundError as missing:
        raise Refused(
            f"{missing.filename} is missing; remove {folder} and run the stage that makes it again"
        ) from missing


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of bytes, one after the other."""
    told = hashlib.sha256()
    for part in parts:
        told.update(part)
    return told.hexdigest()
