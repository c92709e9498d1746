"""Prompts to draw, each with its own seed, read from CSV, JSONL or a list; and templates, filled in.

The columns are the field's own (`case_number, prompt, evaluation_seed, evaluation_guidance`) with the names
other benchmarks give them (I2P's `sd_seed`, `sd_guidance_scale` and `sd_image_width`, COCO's `image_id`). Every other
column is a label, but the nameless ones of row numbers that pandas leaves.

Source: rohitgandikota/erasing, data/*.csv; ml-research/i2p.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esd.errors import UserError

ALIASES = {
    "case_number": ("case_number", "image_id", "id"),
    "evaluation_seed": ("evaluation_seed", "seed", "sd_seed"),
    "guidance": ("evaluation_guidance", "guidance", "guidance_scale", "sd_guidance_scale"),
    "height": ("height", "sd_image_height"),
    "width": ("width", "sd_image_width"),
}

CLASS_COLUMNS = ("class", "label_str")  # label_str in ESD's list of ImageNet's classes
SLOTS = re.compile(r"\{(?:thing|style)\}")
PANDAS_INDEX = re.compile(r"(Unnamed: \d+)?")  # how a CSV calls a column of row numbers that was saved with it

VOWEL_SOUND = re.compile(r"[aeiou]|hour|honest|honou?r|heir", re.IGNORECASE)
CONSONANT_SOUND = re.compile(  # "you..." and "won...": unicorn, user, utensil, ukulele, uranium, UFO, euro, one-eyed
    r"eu|ewe|u(ni[cfloqstv]|s[aeu]|t[ei]|k|ra|ri|fo\b|biq)|on(e(?!r)|ce)", re.IGNORECASE
)


@dataclass(frozen=True)
class PromptRow:
    """One prompt to draw.

    Attributes:
        case_number: names the row and its images; unique among the rows.
        prompt: what the model is asked for.
        evaluation_seed: of the first image's noise; sample s uses evaluation_seed + s.
        guidance: classifier-free guidance scale of this row, or None for the program's.
        labels: what the prompt names, for example {"thing": "cat", "style": "mosaic"}.
        height, width: of its pictures in pixels, or None for the model's own.
    """

    case_number: int
    prompt: str
    evaluation_seed: int
    guidance: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None


def load(
    source: str | Path | Sequence[Any],
    *,
    seed: int = 0,
    samples: int = 1,
    guidance: float | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    without: Collection[int] = (),
    once: bool = False,
) -> list[PromptRow]:
    """The rows of a .csv or .jsonl file, or of a list of prompts; a template stands for a row for each way to fill it.

    Args:
        source: path of a file, or prompts.
        seed: of rows that give none. Those of a template count up from it, so that each of their pictures begins with
            noise of its own: row n has seed + n * samples.
        samples: pictures of each row, from as many seeds.
        guidance: of rows that give none; None is none that a row could give.
        names: what {thing} and {style} run over, for example {"thing": ["cat"], "style": ["mosaic"]}; None for a
            model that names none. A template is labelled with what fills it and with the name that stands in it.
        without: case numbers to pass over, whatever stands in their rows.
        once: take the first of rows that would draw the same image, instead of refusing them.

    Raises:
        UserError: no such file, an unknown kind of file, quotes or commas astray in a CSV, a column that stands twice,
            a prompt that is no text, a row without one, a template and nothing to fill it with, two rows that draw the
            same image, or no rows.
    """
    if isinstance(source, str | Path):
        records = _records(Path(source))
    else:
        records = [({"prompt": prompt}, f"prompt {number}") for number, prompt in enumerate(source, 1)]
    rows: list[PromptRow] = []
    for record, where in records:
        if without and str(record.get("case_number")) in map(str, without):
            continue
        row = _row(record, where, len(rows), seed)
        if not SLOTS.search(row.prompt):
            rows.append(row)
            continue
        if names is None:
            raise UserError(
                f"{where}: {row.prompt!r} holds {{thing}} or {{style}}, and this model ships no vocabulary.json to "
                "fill them from; write the prompts out"
            )
        own = {**row.labels, **_written(row.prompt, names)}
        seeded = any(record.get(name) not in (None, "") for name in ALIASES["evaluation_seed"])
        for number, (prompt, labels) in enumerate(fill(row.prompt, names["thing"], names["style"]), row.case_number):
            first = row.evaluation_seed if seeded else seed + number * samples
            rows.append(
                replace(row, case_number=number, prompt=prompt, evaluation_seed=first, labels={**own, **labels})
            )
    if not rows:
        raise UserError(f"prompts={source} holds no prompts; allowed: at least one row with a 'prompt'")
    if once:
        rows = list({_images(row, 1, guidance)[0]: row for row in reversed(rows)}.values())[::-1]
    _refuse_twins(rows, samples, guidance)
    return rows


def fill(template: str, things: Sequence[str], styles: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(prompt, labels) for every way to fill {thing} and {style} in one template."""
    for thing in things if "{thing}" in template else [None]:
        for style in styles if "{style}" in template else [None]:
            labels = {name: value for name, value in (("thing", thing), ("style", style)) if value is not None}
            yield say(template, labels), labels


def _written(template: str, names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The thing and the style that stand in a template as words, where it has no slot for it and names just one."""
    found = {}
    for domain, known in names.items():
        longest_first = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
        written = set(re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", template)) - {""}
        if len(written) == 1 and f"{{{domain}}}" not in template:
            found[domain] = written.pop()
    return found


def say(template: str, words: Mapping[str, str]) -> str:
    """The template with its slots filled, "a {thing}" with the article that the word takes.

    >>> say("a {thing} in the {style} style", {"thing": "owl", "style": "neon"})
    'an owl in the neon style'
    >>> say("a {}", {"": "grapes"})
    'grapes'
    >>> say("A {} on a pizza {}", {"": "owl"})
    'An owl on a pizza owl'
    """
    for slot, word in words.items():
        template = _filled(template, f"{{{slot}}}", word)
    return template


def _filled(template: str, slot: str, word: str) -> str:
    """The template with a word in one slot; an article before it becomes the word's own, large where it was large."""
    said = articled(word)
    capital = said[:1].upper() + said[1:]
    # an article stands alone: it is neither the end of "pizza" nor that of "vitamin-a"
    article = re.compile(rf"(?<![\w'’-])([aA])n? {re.escape(slot)}")
    return article.sub(lambda found: said if found[1] == "a" else capital, template).replace(slot, word)


def articled(noun: str) -> str:
    """A noun with its indefinite article; none for a plural, told by its ending.

    >>> [articled(noun) for noun in ("bus", "owl", "grapes", "unicorn", "umbrella")]
    ['a bus', 'an owl', 'grapes', 'a unicorn', 'an umbrella']
    """
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    return f"an {noun}" if VOWEL_SOUND.match(noun) and not CONSONANT_SOUND.match(noun) else f"a {noun}"


def _text(prompt: Any, where: str) -> str:
    """A prompt as text; a number, as the prompt 1984 of a list is read, is one.

    Raises:
        UserError: null, true or false, a list or a mapping, or half a character.
    """
    if isinstance(prompt, bool) or not isinstance(prompt, str | int | float):
        raise UserError(f"{where}: {prompt!r} is no text; allowed: text, such as 'a cat'")
    try:
        return str(prompt).encode().decode().strip()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {prompt!r} holds half a character (of a pair in UTF-16); save the file again as UTF-8"
        ) from None


def _records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """(record, "file line n") of every row of a file."""
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"prompts={path}: allowed: a .csv or .jsonl file, or a list such as prompts='[a cat, a dog]'")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                return list(_csv_records(csv.DictReader(file, restval="", strict=True), path))
            return [
                (_parsed(line, f"{path} line {number}"), f"{path} line {number}")
                for number, line in enumerate(file, 1)
                if line.strip()
            ]
    except FileNotFoundError:
        raise UserError(f"prompts={path} does not exist; give a .csv or .jsonl file, or a list of prompts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read as UTF-8 text ({error}); save it again as UTF-8") from error


def _csv_records(reader: csv.DictReader[str], path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, "file line n") of every row of a CSV."""
    mend = "put text that holds a comma in quotes, and close every quote"
    try:
        if "prompt" not in (reader.fieldnames or ()):
            raise UserError(f"prompts={path} has columns {list(reader.fieldnames or ())}; it needs one named 'prompt'")
        if twice := [name for name, n in Counter(reader.fieldnames).items() if name and n > 1]:
            raise UserError(f"prompts={path} has {twice[0]!r} in two columns; name each column once")
        for record in reader:
            where = f"{path} line {reader.line_num}"
            if any(extra := record.pop(None, [])):  # what exceeds the columns
                raise UserError(f"{where} has more fields than the columns, {extra}; {mend}")
            yield record, where
    except csv.Error as error:
        begun = reader.line_num + 1  # the reader counts whole rows
        raise UserError(f"{path} line {begun} is no CSV ({error}); {mend}") from error


def _parsed(line: str, where: str) -> dict[str, Any]:
    """One line of JSONL as a record."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); write one object a line") from error
    if not isinstance(record, dict):
        raise UserError(f'{where} is {type(record).__name__}, not an object; write {{"prompt": "..."}}')
    return record


def _row(record: dict[str, Any], where: str, number: int, seed: int) -> PromptRow:
    """The row of a record; takes the known columns out, what is left are labels."""
    rest = dict(record)
    prompt = _text(rest.pop("prompt", ""), where)
    if not prompt:
        raise UserError(f"{where}: the prompt is empty; give every row a prompt, or remove the row")
    found = {}
    for column, names in ALIASES.items():
        values = [rest.pop(name) for name in names if name in rest]
        found[column] = next((value for value in values if value not in (None, "")), None)
    guidance = _number(found["guidance"], "guidance", where)
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise UserError(f"{where}: guidance={guidance}; allowed: a finite number, at least 0")
    labels = {
        "class" if name in CLASS_COLUMNS else name: str(value).strip()
        for name, value in rest.items()
        if value not in (None, "") and not PANDAS_INDEX.fullmatch(name.strip())
    }
    height, width = (
        None if found[edge] is None else _whole(found[edge], edge, where, 0) for edge in ("height", "width")
    )
    if height == 0 or width == 0:
        raise UserError(f"{where}: height={height}, width={width}; allowed: at least 1 pixel, or neither")
    return PromptRow(
        _whole(found["case_number"], "case_number", where, number),
        prompt,
        _whole(found["evaluation_seed"], "evaluation_seed", where, seed),
        guidance,
        labels,
        height,
        width,
    )


def _number(value: Any, name: str, where: str) -> float | None:
    """A number, or None where there is none."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name}={value!r} is no number") from None


def _whole(value: Any, name: str, where: str, default: int) -> int:
    """A whole number from 0 to 2^63 - 1, or the default where there is none; large seeds keep every digit."""
    number = _number(value, name, where)
    if number is None:
        return default
    whole = int(value) if str(value).isdigit() else int(number) if number.is_integer() else -1
    if not 0 <= whole < 2**63:
        raise UserError(f"{where}: {name}={value}; allowed: a whole number from 0 to 2^63 - 1")
    return whole


def _images(row: PromptRow, samples: int, guidance: float | None) -> list[tuple[Any, ...]]:
    """What decides each of the images of a row: prompt, seed, guidance and size."""
    scale = guidance if row.guidance is None else row.guidance
    return [(row.prompt, row.evaluation_seed + s, scale, row.height, row.width) for s in range(samples)]


def _refuse_twins(rows: Sequence[PromptRow], samples: int, guidance: float | None) -> None:
    """Raises UserError for two rows that would write the same file or draw the same image."""
    numbers: set[int] = set()
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        if row.case_number in numbers:
            raise UserError(f"case_number {row.case_number} stands twice in the prompts; allowed: each number once")
        images = _images(row, samples, guidance)
        if again := [image for image in images if image in seen]:
            apart = f", {samples} apart for as many pictures of each" if samples > 1 else ""
            raise UserError(
                f"prompt {row.prompt!r} with seed {again[0][1]} stands twice, and would count twice; remove one, or "
                f"change its seed{apart}"
            )
        numbers.add(row.case_number)
        seen.update(images)
