"""One small language that names layers by role: what to train, where to hook, what to plot.

    esd_x                            a preset of the model's family
    cross                            every cross-attention parameter      (attn2 is another word for it;
                                     attn1 for self)
    cross.k + cross.v                its key and value projections
    up.cross - up[0].cross           ... in the up stack, but not in its first block
    double.text.joint.add_k          MMDiT: the text stream's keys, in the joint attention of double-stream blocks
    down[0:2].self.v                 a half-open range of blocks, as in Python; down.0:2.self.v is the same
    name:*attn2.to_k*                a glob on full parameter names
    (linear + conv) - cross          kinds of module; parentheses group

A role pattern is a dotted path through the slots

    stack[range] . stream . part . projection . kind

in that order, each of them optional. A word means the first slot, after the one before it, that knows the
word: `out` is the output stack, `cross.out` the output projection of cross-attention; `time` is the time
embedding, `resnet.time` a resnet's projection of it. `all` is everything. `&` (intersection) binds tighter
than `+` (union) and `-` (difference), which go left to right. No commas, which Hydra's overrides would
split; an expression with brackets, parentheses or `&` wants quotes there: 'selection="up[0:2].cross"'.

Every single pattern must match something; one that does not is an error that lists its near misses. Upstream
selects by substrings of names, where a typing mistake trains nothing, silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType

from .errors import UserError

SLOTS = ("stack", "stream", "part", "projection", "kind")
ALIASES = {"attn1": "self", "attn2": "cross"}


@dataclass(frozen=True)
class ParameterInfo:
    """What one parameter of a denoiser is.

    Attributes:
        name: full parameter name.
        numel: number of its values.
        shape: its shape.
        kind: of its module: "linear", "conv", "norm", "embedding" or "other".
        stack: "in", "down", "mid", "up", "out", "time" for a UNet; "double", "single" for FLUX; ...
        index: of the block within its stack, or None.
        part: "cross", "self", "ff", "proj", "resnet", "sampler", "prenorm", ...
        projection: "q", "k", "v", "out", "add_k", ..., or None.
        block: path of the smallest block that holds it, such as "down.1.attentions.0.block.0".
        stream: "image" or "text" in a two-stream transformer, else None.
    """

    name: str
    numel: int
    shape: tuple[int, ...]
    kind: str
    stack: str
    index: int | None
    part: str
    projection: str | None
    block: str
    stream: str | None = None


Preset = str | Callable[[ParameterInfo], bool]


class SelectionError(UserError):
    """A selection that is malformed or matches nothing."""


@dataclass(frozen=True)
class Selection:
    """Parameters chosen by an expression.

    Attributes:
        expression: as the user gave it.
        names: full parameter names, in the model's order.
        numel: number of values in them.
        share: numel over that of the whole denoiser, in (0, 1].
        model: class name of the denoiser.
        table: (role, tensors, values) of each stack and part.
        notes: what the presets in it mean on this architecture, where that needs saying.
    """

    expression: str
    names: tuple[str, ...]
    numel: int
    share: float
    model: str
    table: tuple[tuple[str, int, int], ...]
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line: the expression, the number of tensors and values, the share."""
        return f"{self.expression}: {len(self.names)} tensors, {self.numel:,} values, {self.share:.1%} of {self.model}"

    def describe(self) -> str:
        """The summary and, below it, one line for each stack and part and each note."""
        width = max(len(role) for role, _, _ in self.table)
        rows = [f"  {role:<{width}}  {tensors:>5} tensors  {numel:>13,}" for role, tensors, numel in self.table]
        return "\n".join([self.summary, *rows, *(f"  {note}" for note in self.notes)])


def resolve(
    expression: str,
    infos: Sequence[ParameterInfo],
    presets: Mapping[str, Preset],
    model_name: str,
    *,
    aliases: Mapping[str, str] = ALIASES,
    notes: Mapping[str, str] = MappingProxyType({}),
    absent: Mapping[str, str] = MappingProxyType({}),
) -> Selection:
    """The parameters that an expression names.

    Args:
        expression: in the language of this module.
        infos: every parameter of the denoiser, in its order.
        presets: expressions or predicates by name.
        model_name: class name of the denoiser, for messages.
        aliases: the architecture's other words for roles.
        notes: what presets mean on it; those of the presets used go into the selection.
        absent: roles it has not, with the hint that their error gives.

    Raises:
        SelectionError: the expression is malformed, one of its patterns matches nothing, or nothing is left.
    """
    chosen, used = choose(expression, infos, presets, model_name, aliases=aliases, absent=absent)
    numel = sum(info.numel for info in chosen)
    table: dict[str, tuple[int, int]] = {}
    for info in chosen:
        role = info.stack if info.stack in ("in", "out", "time") else f"{info.stack}.{info.part}"
        tensors, values = table.get(role, (0, 0))
        table[role] = tensors + 1, values + info.numel
    return Selection(
        expression=expression,
        names=tuple(info.name for info in chosen),
        numel=numel,
        share=numel / sum(info.numel for info in infos),
        model=model_name,
        table=tuple((role, *counts) for role, counts in table.items()),
        notes=tuple(f"{name}: {notes[name]}" for name in used if name in notes),
    )


def choose(
    expression: str,
    infos: Sequence[ParameterInfo],
    presets: Mapping[str, Preset],
    model_name: str,
    *,
    aliases: Mapping[str, str] = ALIASES,
    absent: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[ParameterInfo], list[str]]:
    """Those of `infos` that an expression names, in their order, and the presets that it uses; see `resolve`.

    Raises:
        SelectionError: the expression is malformed, one of its patterns matches nothing, or nothing is left.
    """
    parser = _Parser(expression, infos, presets, model_name, aliases, absent)
    found = parser.parse()
    chosen = [info for info in infos if info in found]
    if not chosen:
        raise SelectionError(f"selection {expression!r} leaves nothing of {model_name}; remove a '-' or '&' term")
    return chosen, list(dict.fromkeys(parser.used))


def check(expression: str) -> None:
    """Raises SelectionError for an expression that cannot be read whatever the model; needs none."""
    _Grammar(expression, (), {}, "", {}, {}).parse()


_Found = frozenset[ParameterInfo]
_TOKEN = re.compile(r"\s*(?:([+&()\-])|([^\s+&()\-]+))")
_WORD = re.compile(r"(?P<word>\w+)(?:\[(?P<range>[\d:]+)\])?$")
_RANGE = re.compile(r"(?P<low>\d*)(?P<colon>:?)(?P<high>\d*)$")


class _Parser:
    """Recursive descent over

    sum = product (('+' | '-') product)*     product = atom ('&' atom)*     atom = '(' sum ')' | pattern
    """

    def __init__(
        self,
        expression: str,
        infos: Sequence[ParameterInfo],
        presets: Mapping[str, Preset],
        model_name: str,
        aliases: Mapping[str, str],
        absent: Mapping[str, str],
    ) -> None:
        self.expression, self.infos, self.presets, self.model_name = expression, infos, presets, model_name
        self.aliases, self.absent = aliases, absent
        self.used: list[str] = []  # presets, in the order read
        self.tokens = [operator or word for operator, word in _TOKEN.findall(expression.strip())]
        self.at = 0
        self.words = {slot: {getattr(info, slot) for info in infos} - {None} for slot in SLOTS}

    def parse(self) -> _Found:
        found = self.sum()
        if self.at < len(self.tokens):
            raise self.malformed(f"{self.tokens[self.at]!r} was not expected there")
        return found

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def next(self) -> str:
        if self.at == len(self.tokens):
            raise self.malformed("it ends where a pattern should follow")
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self) -> _Found:
        found = self.product()
        while self.peek() in ("+", "-"):
            found = found | self.product() if self.next() == "+" else found - self.product()
        return found

    def product(self) -> _Found:
        found = self.atom()
        while self.peek() == "&":
            self.next()
            found &= self.atom()
        return found

    def atom(self) -> _Found:
        token = self.next()
        if token == "(":
            found = self.sum()
            if self.peek() != ")":
                raise self.malformed("a ')' is missing")
            self.next()
            return found
        if token in "+-&)":
            raise self.malformed(f"{token!r} was not expected there")
        return self.pattern(token)

    def pattern(self, token: str) -> _Found:
        """The parameters one pattern names: a preset, `all`, a name glob or a role path."""
        if token in self.presets:
            preset = self.presets[token]
            self.used.append(token)
            if isinstance(preset, str):
                return _Parser(preset, self.infos, {}, self.model_name, self.aliases, self.absent).parse()
            found = [info for info in self.infos if preset(info)]
        elif token == "all":
            found = list(self.infos)
        elif token.startswith("name:"):
            glob = token.removeprefix("name:")
            found = [info for info in self.infos if fnmatchcase(info.name, glob)]
        else:
            found = self.role(token)
        if not found:
            raise self.nothing(token)
        return frozenset(found)

    def role(self, token: str) -> list[ParameterInfo]:
        """Parameters on a dotted path through the slots."""
        found, after = list(self.infos), 0
        for piece in token.split("."):
            if _RANGE.match(piece):  # down.0:2 is down[0:2]
                found = self.blocks(found, piece, token, after)
                continue
            match = _WORD.match(piece)
            if not match:
                raise self.no_word(piece)
            word = self.aliases.get(match["word"], match["word"])
            slot = next((i for i in range(after, len(SLOTS)) if word in self.words[SLOTS[i]]), None)
            if slot is None:
                raise self.nothing(token, match["word"])
            found, after = [info for info in found if getattr(info, SLOTS[slot]) == word], slot + 1
            if match["range"]:
                found = self.blocks(found, match["range"], token, after)
        return found

    def blocks(self, found: list[ParameterInfo], text: str, token: str, after: int) -> list[ParameterInfo]:
        """Those of `found` whose block index lies in "2", "0:2", ":2" or "1:"."""
        match = _RANGE.match(text)
        if after != 1 or not match or text == "":
            raise self.malformed(f"the range in {token!r} must follow a stack, as in down[0:2]")
        low = int(match["low"] or 0)
        high = int(match["high"]) if match["high"] else (10**9 if match["colon"] else low + 1)
        return [info for info in found if info.index is not None and low <= info.index < high]

    def no_word(self, piece: str) -> SelectionError:
        return self.malformed(f"{piece!r} is neither a word, a range, nor 'name:' and a glob")

    def malformed(self, why: str) -> SelectionError:
        return SelectionError(f"selection {self.expression!r} cannot be read: {why}; example: 'cross.k + cross.v'")

    def nothing(self, token: str, word: str | None = None) -> SelectionError:
        """The error for a pattern without a match, with what comes nearest to it."""
        near: list[str] = []
        if token.startswith("name:"):
            known = [info.name for info in self.infos]
            near = get_close_matches(token.removeprefix("name:").strip("*"), known, n=3, cutoff=0.5)
        elif word:
            words = sorted({*self.presets, *self.aliases, "all"}.union(*self.words.values()))
            near = get_close_matches(word, words, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(sorted(near))}" if near else self.choices()
        hint = self.absent.get(word or "", hint)
        return SelectionError(f"selection {token!r} matched nothing in {self.model_name}; {hint}")

    def choices(self) -> str:
        """What is there to choose from, when no word is near."""
        indices: dict[str, int] = {}
        for info in self.infos:
            if info.index is not None:
                indices[info.stack] = max(info.index, indices.get(info.stack, 0))
        stacks = [f"{stack}[0:{last + 1}]" for stack, last in indices.items()]
        choices = {"stacks": stacks, "parts": sorted(self.words["part"]), "presets": list(self.presets)}
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in choices.items() if names)


class _Grammar(_Parser):
    """Reads an expression without a model: any word may name something, so only its form is held against it."""

    def pattern(self, token: str) -> _Found:
        for piece in () if token.startswith("name:") else token.split("."):
            if not piece or not (_RANGE.match(piece) or _WORD.match(piece)):
                raise self.no_word(piece)
        return frozenset()
