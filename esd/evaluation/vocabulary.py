"""What a bundled model knows: its things and styles, and the phrasings it was and was not trained on.

A model made for experiments ships `vocabulary.json` beside its weights. It tells which prompts to train on,
which to measure on, and which other concepts must survive. A real model ships none; then `Vocabulary.load`
returns None and rates are not computed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from esd.errors import UserError
from esd.evaluation.prompts import fill

T = TypeVar("T")

DOMAINS = ("thing", "style")
OTHER = {"thing": "style", "style": "thing"}


@dataclass(frozen=True)
class Entry:
    """One thing or style: its name, the group it belongs to, what else it is called, and what its kind is called.

    Hypernyms have their article, "an animal"; synonyms have none.
    """

    name: str
    group: str = ""
    synonyms: tuple[str, ...] = ()
    hypernyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What was erased, in a model's own words.

    Attributes:
        domain: "thing" or "style".
        name: of the thing or style.
        within: the one style or thing that it was erased from; None where it was erased from all.
    """

    domain: str
    name: str
    within: str | None = None

    def named(self, labels: Mapping[str, str]) -> bool:
        """Whether labels name the concept, with whatever else."""
        return labels.get(self.domain) == self.name

    def meant(self, labels: Mapping[str, str]) -> bool:
        """Whether what these labels name should be gone."""
        return self.named(labels) and (self.within is None or self.touched(labels))

    def touched(self, labels: Mapping[str, str]) -> bool:
        """Whether labels name what the concept was erased from."""
        return self.within is not None and labels.get(OTHER[self.domain]) == self.within


@dataclass(frozen=True)
class Vocabulary:
    """What a model knows.

    Attributes:
        things, styles: in the order of the file.
        phrasings: "train" or "held_out" to kind ("both", "thing", "style", "scene") to templates.
        held_out_pairs: (thing, style) pairs that the model never saw together.
        hash: sha256 of the file, or None for one made in memory.
    """

    things: tuple[Entry, ...]
    styles: tuple[Entry, ...]
    phrasings: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    held_out_pairs: frozenset[tuple[str, str]] = frozenset()
    hash: str | None = None

    @classmethod
    def load(cls, model_dir: str | Path) -> Vocabulary | None:
        """The vocabulary in a model's folder; None where the model ships none.

        Raises:
            UserError: the file is there but is not a vocabulary, or lacks phrasings that measuring needs.
        """
        path = Path(model_dir) / "vocabulary.json"
        if not path.is_file():
            return None
        try:
            content = path.read_bytes()
            told = json.loads(content)
            _check_phrasings(told["phrasings"]["held_out"], path)
            return cls(
                tuple(map(_entry, told["things"])),
                tuple(map(_entry, told["styles"])),
                told["phrasings"],
                frozenset((thing, style) for thing, style in told.get("held_out_pairs", ())),
                hashlib.sha256(content).hexdigest(),
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no vocabulary ({error!r}); remove it or restore it") from error

    def entries(self, domain: str) -> tuple[Entry, ...]:
        """The entries of "thing" or "style"."""
        return self.things if domain == "thing" else self.styles

    def names(self, domain: str, *, but: Collection[str] = ()) -> list[str]:
        """Names in a domain, without those in `but`."""
        return [entry.name for entry in self.entries(domain) if entry.name not in but]

    def find(self, concept: str) -> tuple[str, Entry] | None:
        """(domain, entry) of a concept given by name or synonym, with or without article; None if unknown."""
        wanted = plain(concept)
        for domain in DOMAINS:
            for entry in self.entries(domain):
                if wanted in map(plain, (entry.name, *entry.synonyms)):
                    return domain, entry
        return None

    def labels(self, given: Mapping[str, str]) -> dict[str, str]:
        """Labels with thing and style by the name that the model knows; another word for it is kept as "called".

        What the model does not know stays as it is.
        """
        found = dict(given)
        for domain in (domain for domain in DOMAINS if domain in given):
            value = given[domain]
            known = self.find(value)
            if known and known[0] == domain:
                found[domain] = known[1].name
                if plain(value) != plain(known[1].name):
                    found.setdefault("called", value)
        return found

    def targets(self, concepts: Sequence[str], erase_from: Sequence[str] = ()) -> list[Target]:
        """What is erased, of the concepts that the model knows.

        Args:
            concepts: names or synonyms.
            erase_from: () or as many texts, each naming what its concept is erased from, as "cat" and "cat in the
                mosaic style" do for a style.
        """
        targets = []
        for concept, text in zip(concepts, erase_from or [""] * len(concepts), strict=True):
            if found := self.find(concept):
                domain, entry = found
                told = self.named(text)
                own = told.get(domain, entry.name) == entry.name  # not another's: "dog in the mosaic style" for a cat
                targets.append(Target(domain, entry.name, told.get(OTHER[domain]) if own else None))
        return targets

    def named(self, text: str) -> dict[str, str]:
        """{domain: name} of the first thing and the first style that a text names; see `mentioned`."""
        return dict(reversed(self.mentioned(text)))

    def mentioned(self, text: str) -> list[tuple[str, str]]:
        """(domain, name) of everything that a text names, in its order.

        A synonym counts as its name; of words that begin alike the longest counts, so that "hot dog" is no dog.
        """
        words = {
            plain(word): (domain, entry.name)
            for domain in DOMAINS
            for entry in self.entries(domain)
            for word in (entry.name, *entry.synonyms)
        }
        longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        return [words[word] for word in re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", text.lower())]

    def neighbours(self, domain: str, name: str) -> list[str]:
        """The other names of a domain, those of the same group first."""
        group = next((entry.group for entry in self.entries(domain) if entry.name == name), "")
        others = [entry for entry in self.entries(domain) if entry.name != name]
        return [entry.name for entry in sorted(others, key=lambda entry: not group or entry.group != group)]


def expand_prompts(
    templates: Sequence[str], vocabulary: Vocabulary | None, *, but: Sequence[Target] = ()
) -> list[list[str]]:
    """For each template, every prompt it stands for: {thing} and {style} run over what the model knows.

    Args:
        templates: texts that may hold {thing} and {style}.
        vocabulary: of the model, or None.
        but: what {thing} and {style} leave out.

    Raises:
        UserError: a template holds {thing} or {style}, and the model ships no vocabulary or knows nothing else.
    """
    return [[prompt for prompt, _ in _filled(template, vocabulary, but)] for template in templates]


def spared_prompts(
    templates: Sequence[str], vocabulary: Vocabulary | None, erased: Sequence[Target]
) -> list[list[str]]:
    """For each template to preserve, every prompt it stands for that does not name what is erased.

    Where a concept is erased from one thing or style only, the template may name one of the two itself: with a mosaic
    erased from the cat, "a cat in the {style} style" is every style but mosaic, "a {thing} in mosaic" all but the cat.

    Args:
        templates: texts that may hold {thing} and {style}.
        vocabulary: of the model, or None.
        erased: what is.

    Raises:
        UserError: see `expand_prompts`; or whatever a template stands for names what is erased.
    """

    def touches(names: set[tuple[str, str]]) -> bool:
        return any(
            (t.domain, t.name) in names and (t.within is None or (OTHER[t.domain], t.within) in names) for t in erased
        )

    spared = []
    for template in templates:
        written = set(vocabulary.mentioned(template) if vocabulary else ())
        filled = _filled(template, vocabulary, ())
        spared.append([prompt for prompt, told in filled if not touches(written | set(told.items()))])
        if not spared[-1]:
            raise UserError(
                f"preserve.prompts: {template!r} names what is erased, which cannot be preserved too; write {{thing}} "
                "or {style} in its place, or leave the prompt out"
            )
    return spared


def _filled(template: str, vocabulary: Vocabulary | None, but: Sequence[Target]) -> list[tuple[str, dict[str, str]]]:
    """(prompt, labels) of all that a template stands for; see `expand_prompts`."""
    known = [vocabulary.names(d, but=[t.name for t in but if t.domain == d]) if vocabulary else [] for d in DOMAINS]
    if filled := list(fill(template, *known)):
        return filled
    why = "knows nothing but what is erased" if vocabulary else "ships no vocabulary.json"
    raise UserError(
        f"prompts: {template!r} holds {{thing}} or {{style}}, and this model {why} to fill them from; write the "
        "prompts out"
    )


def in_turns(choices: Sequence[Sequence[str]]) -> list[str]:
    """One of each choice, then the next of each, until the longest is through: all weigh the same."""
    longest = max((len(texts) for texts in choices), default=0)
    return [texts[turn % len(texts)] for turn in range(longest) for texts in choices]


def evenly_spaced(items: Sequence[T], n: int) -> list[T]:
    """At most n of the items, evenly spaced over the list, so that groups which stand together all have their share.

    >>> evenly_spaced(["cat", "dog", "rose", "tulip", "bus", "car"], 3), evenly_spaced(["cat"], 3)
    (['cat', 'rose', 'bus'], ['cat'])
    """
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def _check_phrasings(held_out: Mapping[str, Any], path: Path) -> None:
    """Raises UserError unless there are templates to measure with, each with the slots of its kind."""
    for kind, slots in {"both": ("{thing}", "{style}"), "thing": ("{thing}",), "style": ("{style}",)}.items():
        templates = held_out.get(kind)
        texts = templates if isinstance(templates, list) else []
        if not texts or not all(isinstance(text, str) and all(slot in text for slot in slots) for text in texts):
            raise UserError(
                f"{path}: phrasings.held_out.{kind} is {templates!r}; allowed: a list of templates that hold "
                f"{' and '.join(slots)}; restore the file"
            )


def _entry(told: Mapping[str, Any]) -> Entry:
    """An entry of the file."""
    other = (tuple(told.get(words, ())) for words in ("synonyms", "hypernyms"))
    return Entry(str(told["name"]), str(told.get("group", "")), *other)


def says(text: str, name: str) -> bool:
    """Whether a text has a name among its words, in any case."""
    return bool(re.search(rf"(?<!\w){re.escape(plain(name))}(?!\w)", text.lower()))


def plain(text: str) -> str:
    """A concept as it is compared: lower case, no article."""
    words = text.lower().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)
