"""Words of prompts as text tokens of the denoiser, and the tokens of one prompt that stand for those of another.

Source: prompt-to-prompt (arXiv:2208.01626), `seq_aligner.py` of google/prompt-to-prompt. Here words are aligned, and
tokens follow them; and attention that goes to tokens without a partner, such as padding, goes to their neighbours.
There, it is lost or counted twice where the prompts are not equally many tokens long.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Family
from esd.families.base import Span

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Alignment:
    """Which tokens of a source prompt stand for those of a target prompt.

    Attributes:
        matrix: M (source tokens, target tokens), float32: the source's probabilities times M are the target's.
        known: alpha (target tokens,), float32 in [0, 1]: 1 where a token has a partner in the source.
    """

    matrix: Tensor
    known: Tensor


def words_of(prompt: str) -> list[str]:
    """Its words and signs, in small letters.

    >>> words_of("A cat, a rose")
    ['a', 'cat', ',', 'a', 'rose']
    """
    return _WORD.findall(prompt.lower())


def positions_of(family: Family, prompt: str, word: str) -> list[int]:
    """Text tokens that stand for a word, or for several that follow one another, wherever it is in a prompt.

    Raises:
        UserError: the prompt has no such word, or the text encoder does not read that far.
    """
    found = re.finditer(rf"(?<!\w){re.escape(word.lower())}(?!\w)", prompt.lower()) if word.strip() else ()
    places = [match.span() for match in found]
    if not places:
        raise UserError(f"{word!r} is not in the prompt {prompt!r}; its words: {', '.join(words_of(prompt))}")
    tokens = [span for segment in family.token_spans(prompt) for span in segment]
    positions = [i for i, span in enumerate(tokens) if span and any(_overlap(span, at, prompt) for at in places)]
    if not positions:
        raise UserError(f"{word!r} stands where {prompt!r} is no longer read; shorten the prompt")
    return positions


def token_texts(family: Family, prompt: str) -> list[str]:
    """What each text token stands for; "" for start, end and padding."""
    return [prompt[span[0] : span[1]].strip() if span else "" for part in family.token_spans(prompt) for span in part]


def aligned(family: Family, source: str, target: str, how: Literal["replace", "refine"]) -> Alignment:
    """The alignment of two prompts.

    Args:
        family: of the model, whose tokenizer says what the tokens are.
        source: the prompt whose attention is taken.
        target: the prompt that gets it.
        how: "replace": word i stands for word i, and where they are n and m tokens, each of the m gets 1/m of all of
            the n. "refine": only equal words stand for one another, by Needleman-Wunsch alignment.

    Raises:
        UserError: "replace" with prompts of unequally many words, or prompts that share no word.
    """
    words = words_of(source), words_of(target)
    if how == "replace":
        if len(words[0]) != len(words[1]):
            raise UserError(
                f"replace: {source!r} has {len(words[0])} words, {target!r} has {len(words[1])}; give prompts of "
                "equally many, or take how='refine'"
            )
        pairs = [(i, i) for i in range(len(words[0]))]
    else:
        pairs = alignment(*words)
        if not pairs:
            raise UserError(f"refine: {source!r} and {target!r} share no word; take how='replace', or another source")
    texts, segments = (source, target), (family.token_spans(source), family.token_spans(target))
    matrices, known = [], []
    for parts in zip(*segments, strict=True):
        grouped = [_by_word(part, text) for part, text in zip(parts, texts, strict=True)]
        matrix = torch.zeros(len(parts[0]), len(parts[1]))
        for i, j in [(-1, -1), *pairs]:  # -1: what stands for no word
            _stand_for(matrix, grouped[0].get(i, []), grouped[1].get(j, []), word=i >= 0)
        matrices.append(matrix)
        known.append((matrix.sum(0) > 0).float())
    return Alignment(torch.block_diag(*matrices), torch.cat(known))


def alignment(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Equal words of two texts, in order, by Needleman-Wunsch: match 1, mismatch -1, gap 0.

    >>> alignment("a cat and a rose".split(), "a red cat and a big rose".split())
    [(0, 0), (1, 2), (2, 3), (3, 4), (4, 6)]
    """
    score = torch.zeros(len(source) + 1, len(target) + 1, dtype=torch.int64).tolist()
    for i, one in enumerate(source):
        for j, other in enumerate(target):
            both = score[i][j] + (1 if one == other else -1)
            score[i + 1][j + 1] = max(both, score[i][j + 1], score[i + 1][j])
    i, j, pairs = len(source), len(target), []
    while i and j:
        if source[i - 1] == target[j - 1] and score[i][j] == score[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _by_word(spans: Sequence[Span | None], prompt: str) -> dict[int, list[int]]:
    """Number of a word to its tokens; those of none, and signs that are none, under -1."""
    words = [match.span() for match in _WORD.finditer(prompt)]
    grouped: dict[int, list[int]] = {}
    for token, span in enumerate(spans):
        number = next((i for i, at in enumerate(words) if span and _overlap(span, at, prompt)), -1)
        grouped.setdefault(number, []).append(token)
    return grouped


def _stand_for(matrix: Tensor, source: Sequence[int], target: Sequence[int], *, word: bool) -> None:
    """Gives the target's tokens what the source's have, one to one where they are equally many.

    Where they are not, a word's tokens share evenly. Of what stands for no word (start, end, padding) the last token
    shares with those that are too many.
    """
    if not source or not target:
        return
    single = min(len(source), len(target))
    if len(source) != len(target):
        single = 0 if word else single - 1
    for i, j in zip(source[:single], target[:single], strict=True):
        matrix[i, j] = 1
    rest = target[single:]
    for i in source[single:]:
        matrix[i, rest] = 1 / len(rest)


def _overlap(span: Span, at: Span, text: str) -> bool:
    """Whether a token's characters, but for spaces, are some of a word's."""
    return bool(text[max(span[0], at[0]) : min(span[1], at[1])].strip())
