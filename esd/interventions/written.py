"""Interventions written as text, as settings hold them: "Skip(up[0].cross, steps=(0, 5))".

The name of an op, where it takes hold, and its settings as Python writes them. Nothing is evaluated. Only ops that
stand for themselves can be written: others take another run, weights, words or functions, and some keep what they saw.
Nor can rows, which are of one batch: a run draws many.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from esd.errors import UserError

from .ops import SiteOp
from .streams import Scale, Skip

KNOWN: dict[str, type[SiteOp]] = {"Skip": Skip, "Scale": Scale}
EXAMPLE = "'Skip(up[0].cross, steps=(0, 5))' or 'Scale(mid, activation=0.5, on=cond)'"


def read(texts: Sequence[str]) -> list[SiteOp]:
    """The ops that some texts stand for, in their order.

    >>> read(["Skip(mid)", "Scale(cross, activation=0.5, steps=(0.0, 0.5))"])[1].steps
    (0.0, 0.5)

    Raises:
        UserError: a text is no such op, or a setting of it is unknown or out of range.
    """
    return [_read(text) for text in texts]


def _read(text: str) -> SiteOp:
    match = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", text, re.DOTALL)
    kind = KNOWN.get(match[1]) if match else None
    if not match or not kind:
        raise UserError(
            f"interventions: {text!r}; allowed: {', '.join(KNOWN)}, such as {EXAMPLE}; other ops need runs, words or "
            "weights that a setting cannot hold: use esd.interventions.sample in Python"
        )
    where, *given = _split(match[2])
    settings = dict(one.partition("=")[::2] for one in given)
    allowed = [field.name for field in dataclasses.fields(kind) if field.init and field.name not in ("where", "rows")]
    for name in settings:
        if name.strip() == "rows":
            raise UserError(
                f"interventions: {text!r} sets rows, which are of one batch, and a run draws many; leave rows, "
                "or use esd.interventions.sample in Python"
            )
        if name.strip() not in allowed:
            raise UserError(f"interventions: {text!r} sets {name.strip()!r}; allowed: {', '.join(allowed)}")
    values: dict[str, Any] = {name.strip(): _value(text, value.strip()) for name, value in settings.items()}
    try:
        return kind(where.strip(), **values)
    except TypeError as error:
        raise UserError(f"interventions: {text!r} cannot be read ({error}); example: {EXAMPLE}") from error


def _split(text: str) -> list[str]:
    """The parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _value(text: str, value: str) -> object:
    """A number, a tuple, or a word."""
    if re.fullmatch(r"[a-z]+", value):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"interventions: {text!r}: {value!r} is no value; example: {EXAMPLE}") from error
