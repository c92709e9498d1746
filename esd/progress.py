"""What a long run tells while it goes, and how it hears that it should stop.

A training's `metrics.jsonl` gets a line for every update, whole even when the run is killed, and its progress bar shows
the loss and the time left; everything else that takes long has a bar too. SIGTERM, which clusters send before they take
a machine away, and Ctrl-C are noted and acted on between two updates.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .storage import atomic

SELDOM = 30.0  # seconds between two lines of a bar that nobody watches


def bar(
    what: str, total: int | None = None, *, unit: str, first: int = 0, leave: bool = True, shown: bool = True
) -> tqdm[Any]:
    """A progress bar with the time left; where no terminal is, it is written every half minute.

    Args:
        what: goes on, which the bar begins with.
        total: units in all; None is unknown, and the bar counts.
        unit: of what is counted.
        first: units done before.
        leave: whether the bar stays once all is done.
        shown: False shows none, as in all processes but one.
    """
    pace = {} if on_terminal() else {"mininterval": SELDOM, "maxinterval": SELDOM, "delay": SELDOM}
    how: dict[str, Any] = {"leave": leave, "disable": not shown, "dynamic_ncols": True, **pace}
    return tqdm(desc=what, total=total, initial=first, unit=unit, **how)


def on_terminal() -> bool:
    """Whether somebody watches: progress bars, which go to stderr, are read on a terminal."""
    return bool(getattr(sys.stderr, "isatty", bool)())


def say(progress: tqdm[Any], line: str) -> None:
    """Prints a line: above the bar on a terminal, and in a log without drawing the bar before its time."""
    if on_terminal():
        progress.write(line)
    else:
        print(line, flush=True)


class Log:
    """metrics.jsonl, one line per update, and a progress bar with the loss and the time left.

    Args:
        path: of the file; lines of updates after `first` are dropped, they are about to be written again.
        first: updates done before.
        updates: updates in all.
        enabled: False makes it silent, on all processes but one.
    """

    def __init__(self, path: Path, first: int, updates: int, *, enabled: bool) -> None:
        self.path, self.first, self.updates, self.enabled = path, first, updates, enabled

    def __enter__(self) -> Log:
        if self.enabled:
            kept = self._lines_kept()
            with atomic(self.path) as staged:  # a kill here leaves the old file or the new one, never half of it
                staged.write_text("".join(kept), encoding="utf-8")
            self.file = self.path.open("a", encoding="utf-8")
        self.bar = bar("training", self.updates, unit="update", first=self.first, shown=self.enabled)
        self.times: list[float] = []
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.enabled:
            self.file.close()

    def _lines_kept(self) -> list[str]:
        """The lines of the updates done before; a line that a crash cut short is dropped."""
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                if json.loads(line)["step"] <= self.first:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        return kept

    def write(self, metrics: Mapping[str, float]) -> None:
        """Adds one update's metrics."""
        if not self.enabled:
            return
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        self.bar.set_postfix(loss=f"{metrics['loss']:.3g}", refresh=False)
        self.bar.update()
        self.times.append(metrics["seconds"])
        if len(self.times) == 5:  # the first update also builds the bank
            left = (self.times[-1] - self.times[0]) / 4 * (self.updates - metrics["step"])
            say(self.bar, f"about {left:.0f} s left" if left < 120 else f"about {left / 60:.0f} minutes left")


@contextmanager
def termination() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the number of the SIGTERM or SIGINT (Ctrl-C) that has come, or 0.

    A second Ctrl-C interrupts at once. The old handlers are back afterwards. Outside the main thread, where
    Python delivers no signals, the number stays 0.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield lambda: 0
        return
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
