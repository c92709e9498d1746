"""How every analysis begins: its folder is held to what is looked into, and how."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

from .results import Results
from .subject import Subject

P = ParamSpec("P")
Analysis = Callable[Concatenate[Subject, Results, P], None]


def analysis(analyse: Analysis[P]) -> Analysis[P]:
    """Has an analysis refuse a folder with results of another model, another analysis or other settings.

    Args:
        analyse: takes a subject, its results and settings, by name.
    """
    name = analyse.__module__.removeprefix(f"{__package__}.").split(".")[0]

    @wraps(analyse)
    def begun(subject: Subject, results: Results, *args: P.args, **settings: P.kwargs) -> None:
        results.hold(subject.facts() | {"settings": {"analysis": name, **settings}})
        analyse(subject, results, *args, **settings)

    return begun
