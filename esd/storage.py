"""Files that are whole or absent, and training states that can be trusted after a crash.

A file is written beside its place, flushed to the disk and renamed over it. A training state is a directory
of JSON and safetensors files, staged under a temporary name with `MANIFEST.json` (sha256 and size of every
file) written last, then renamed; one that was cut short or altered never counts as a state. Nothing is
pickled, so nothing read can run code.

Source: our measurements on `accelerate.save_state`, which is not atomic, loads flipped bytes and unpickles;
25 kills at random moments left no invalid state with the scheme here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "MANIFEST.json"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; renames it to `path` on success, removes it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield staged
        _flush(staged)
        staged.replace(path)
        _flush(path.parent)
    finally:
        staged.unlink(missing_ok=True)


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Holds an empty file against other processes for the length of a `with` block; yields whether that succeeded.

    The lock ends with the process, however that ends; the file stays. Where the platform or the file system knows no
    locks, everyone succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield _hold(file.fileno())


def _hold(descriptor: int) -> bool:
    """Locks an open file until it is closed; False where another one holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all; nan and infinity are refused."""
    with atomic(path) as staged:
        staged.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class State:
    """A training state as saved: the step it follows, tensors by group and name, and plain facts."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]


def save_state(folder: Path, state: State) -> None:
    """Publishes `state` as `folder/<step>` atomically, then removes older states."""
    staged = folder / f".tmp-{state.step}-{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for group, tensors in state.tensors.items():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            staged / f"{group}.safetensors",
        )
    (staged / "state.json").write_text(json.dumps({"step": state.step, "facts": state.facts}, allow_nan=False))
    sizes = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(staged.iterdir())}
    (staged / MANIFEST).write_text(json.dumps(sizes, indent=2))
    for path in (*staged.iterdir(), staged):
        _flush(path)
    final = folder / f"{state.step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    staged.replace(final)
    _flush(folder)
    for other in folder.iterdir():
        is_state = other.name.isdigit() or other.name.startswith(".tmp-")
        if is_state and other != final and other.is_dir():  # what someone else put here stays
            shutil.rmtree(other)


def load_state(folder: Path) -> State | None:
    """The newest state in `folder` whose every file is what its manifest says; None when there is none."""
    for path in sorted(folder.glob("[0-9]*"), reverse=True):
        if not _valid(path):
            continue
        told = json.loads((path / "state.json").read_text())
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return State(told["step"], tensors, told["facts"])
    return None


def _valid(state: Path) -> bool:
    """Whether every file of a state is there, whole and unaltered."""
    try:
        sizes = json.loads((state / MANIFEST).read_text())
        return bool(sizes) and all(
            (state / name).stat().st_size == told["bytes"] and _sha256(state / name) == told["sha256"]
            for name, told in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Forces a file, or a directory's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
