"""A setting that knows what it means and which values it may take, and the check that holds it to that."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any

from esd.errors import UserError


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that knows what it means and which values it may take.

    Numbers must be finite besides keeping their bounds; a list applies the rule to each of its elements.
    """
    rule = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"help": help, "rule": {k: v for k, v in rule.items() if v is not None}, "one_of": one_of}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raises UserError for the first field below `config`, named behind `prefix`, whose value breaks its own rule."""
    for name, value, spec in fields_of(config, prefix):
        one_of, rule = spec.metadata.get("one_of"), spec.metadata.get("rule", {})
        if one_of and value is not None and value not in one_of:
            example = spec.default or "null"
            raise UserError(f"{name}={value}: allowed: {', '.join(one_of)}; for example {name}={example}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool) and not _keeps(number, rule):
                words = " and ".join(f"{word} {bound:g}" for word, bound in rule.items()) or "any size"
                example = "null" if spec.default is None else spec.default
                mend = "" if isinstance(value, list) else f"; for example {name}={example}"
                raise UserError(f"{name}={value}: allowed: a finite number, {words}{mend}")


def _keeps(number: float, rule: dict[str, float]) -> bool:
    """Whether a number is finite and inside its bounds."""
    tests = {
        "at least": number >= rule.get("at least", number),
        "above": number > rule.get("above", -math.inf),
        "at most": number <= rule.get("at most", number),
        "below": number < rule.get("below", math.inf),
    }
    return math.isfinite(number) and all(tests.values())


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted name, value, field) of every leaf, in the order of declaration."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{spec.name}.")
        else:
            yield prefix + spec.name, value, spec
