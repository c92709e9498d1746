"""Ops on attention probabilities: see where each text token is attended to, and edit that as prompt-to-prompt does.

With A = softmax(Q Kᵀ / √d) of image queries and text keys, A_src the same in a source's row of the batch, M and alpha
an alignment of the two prompts (`esd.interventions.words`):

    replace, refine   A* = A_src M alpha + A (1 - alpha)
    reweight          A* = A eq, eq the weight of each token
    self-attention    A* = A_src, of image queries and image keys, where these are few

In cross-attention all keys are text. In the joint attention of transformers they are the text part of the keys of a
row, so that rows of A* need not sum to one with the image part, which keeps what it was unless it is replaced too.

Source: prompt-to-prompt (arXiv:2208.01626), google/prompt-to-prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from esd.errors import UserError
from esd.families import Family

from .clock import Moment, check_range, check_schedule
from .ops import AttentionOp, Call, Op, Sampling, Source, check_finite
from .probabilities import Attention
from .sites import Site, describe
from .words import Alignment, aligned, positions_of

Steps = float | tuple[int, int] | tuple[float, float]  # a float is the share of all steps, from the first


class MapKey(NamedTuple):
    """Of what a map is: a place, a step and a head, unless these are averaged; a size."""

    place: str | None
    step: int | None
    grid: tuple[int, int]
    head: int | None = None


@dataclass
class Maps:
    """Where text tokens were attended to.

    Attributes:
        sums: (rows, tokens, h, w), float32 on the CPU, summed over heads and over whatever else the key does not tell.
        counts: how many were summed.
    """

    sums: dict[MapKey, Tensor] = field(default_factory=dict)
    counts: dict[MapKey, int] = field(default_factory=dict)

    @property
    def gib(self) -> float:
        """What they take."""
        return sum(kept.nbytes for kept in self.sums.values()) / 2**30

    @property
    def steps(self) -> list[int]:
        """Steps that there are maps of."""
        return sorted({key.step for key in self.sums if key.step is not None})

    @property
    def places(self) -> list[str]:
        """Labels of the attentions that there are maps of, where they were kept apart."""
        return list(dict.fromkeys(key.place for key in self.sums if key.place is not None))

    @property
    def heads(self) -> list[int]:
        """Heads that there are maps of, where they were kept apart."""
        return sorted({key.head for key in self.sums if key.head is not None})

    def clear(self) -> None:
        """Forgets all."""
        self.sums.clear()
        self.counts.clear()

    def add(self, key: MapKey, maps: Tensor) -> None:
        """Adds maps (rows, heads, tokens, h, w)."""
        summed = maps.detach().sum(1).cpu()
        self.sums[key] = self.sums[key] + summed if key in self.sums else summed
        self.counts[key] = self.counts.get(key, 0) + maps.shape[1]

    def mean(self, step: int | None = None, place: str | None = None, head: int | None = None) -> Tensor:
        """(rows, tokens, h, w): the mean over steps, places and heads, unless one is named.

        Maps of several sizes are resized to the largest, which leaves their sum over tokens as it is.

        Raises:
            UserError: there are none.
        """
        found = {
            key: kept
            for key, kept in self.sums.items()
            if step in (None, key.step) and place in (None, key.place) and head in (None, key.head)
        }
        if not found:
            told = (
                f"steps {self.steps}, places {', '.join(self.places) or 'averaged'}, heads {self.heads or 'averaged'}"
            )
            raise UserError(
                f"no attention maps of step {step}, place {place}, head {head}; there are: "
                f"{told if self.sums else 'none at all'}"
            )
        size = max((key.grid for key in found), key=lambda grid: grid[0] * grid[1])
        total = torch.stack([_resized(kept, size) for kept in found.values()]).sum(0)
        return total / sum(self.counts[key] for key in found)

    def by_step(self, place: str | None = None) -> Tensor:
        """(steps, rows, tokens, h, w)."""
        return torch.stack([self.mean(step, place) for step in self.steps])


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(AttentionOp):
    """Keeps where in the picture each text token is attended to; changes nothing.

    Attributes:
        resolution: edge of the maps that are kept, in image tokens; other sites' are left out. None keeps all.
        by_place: whether to keep sites apart.
        by_step: whether to keep steps apart.
        by_head: whether to keep heads apart.
        max_gib: most memory that maps may take.
        maps: what was kept; rows are those that the op is confined to.
    """

    resolution: int | None = None
    by_place: bool = False
    by_step: bool = True
    by_head: bool = False
    max_gib: float = 2.0
    maps: Maps = field(init=False, compare=False, repr=False, default_factory=Maps)

    def __post_init__(self) -> None:
        """Raises UserError for both passes at once, whose maps would be averaged."""
        super().__post_init__()
        if self.on == "both":
            raise UserError(f"{type(self).__name__}(on='both'): allowed: cond, uncond; take one op for each")
        check_finite(self, "max_gib", self.max_gib)

    def check(self, site: Site) -> None:
        """Raises UserError for an attention that reads no text."""
        _reads_text(site, self)

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """See `Op.fits`; no attention has the resolution."""
        super().fits(sampling, sites)
        check_resolution(self, self.resolution, sampling, sites)

    def renew(self) -> None:
        """Forgets the maps of another sampling."""
        self.maps.clear()

    def attend(self, call: Call, attention: Attention) -> None:
        """Adds the maps; changes nothing."""
        if call.moment.stage:
            return  # each step counts once
        if self.resolution in (None, max(attention.layout.grid)):
            maps = token_maps(attention, call.positions)
            place, step = call.site.label if self.by_place else None, call.moment.step if self.by_step else None
            key = MapKey(place, step, attention.layout.grid)
            heads = [(key._replace(head=attention.first + i), maps[:, [i]]) for i in range(maps.shape[1])]
            for named, part in heads if self.by_head else [(key, maps)]:
                self.maps.add(named, part)
        if self.maps.gib > self.max_gib:
            raise UserError(
                f"AttentionMaps: maps of {self.told} take more than max_gib={self.max_gib:g}; give a resolution, "
                "name fewer sites or steps, or raise max_gib"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionEdit(AttentionOp):
    """Gives a prompt the attention of another, so that the picture keeps its layout.

    AttentionEdit("cross + self", source=Source("a cat and a rose", 0), self_replace_steps=0.4)

    Attributes:
        where: cross-attentions, self-attentions, or joint attentions, which are both.
        source: the other prompt and seed, or the number of a sample in the batch.
        how: "replace" for prompts of equally many words, "refine" for one that says more; see `words.aligned`.
        cross_replace_steps: when attention to the text is replaced: a share of the steps, from the first, or a range.
        word_steps: the same for single words of the target prompt.
        self_replace_steps: when attention of the image to itself is replaced.
        self_tokens: most image tokens of an attention of which that is replaced.
    """

    source: Source | int = field(default=0)
    how: Literal["replace", "refine"] = "replace"
    cross_replace_steps: Steps = 0.8
    word_steps: Mapping[str, Steps] = field(default_factory=dict)
    self_replace_steps: Steps = 0.0
    self_tokens: int = 256
    _known: dict[tuple[str, str], Alignment] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError for steps that are none, or another name of `how`."""
        super().__post_init__()
        if self.how not in ("replace", "refine"):
            raise UserError(f"AttentionEdit(how={self.how!r}): allowed: replace, refine")
        for name, steps in self._ranges():
            _range(name, steps)
        check_finite(self, "self_tokens", self.self_tokens)

    def sites(self, family: Family) -> list[Site]:
        """The attentions; raises UserError where what is asked for changes nothing at some of them."""
        found = super().sites(family)
        selves = [site for site in found if site.part not in ("cross", "joint")]
        crosses = [site for site in found if site.part != "self"]
        replaced = _some(self.self_replace_steps)
        if selves and not replaced:
            raise UserError(f"AttentionEdit: {selves[0].label} is self-attention; give self_replace_steps, such as 0.4")
        if replaced and not [site for site in found if site.part != "cross"]:
            raise UserError(f"AttentionEdit: {self.told} names no self-attention; leave self_replace_steps=0")
        asked = [self.cross_replace_steps, *self.word_steps.values()]
        if crosses and not any(map(_some, asked)) and not (replaced and crosses[0].part == "joint"):
            raise UserError(f"AttentionEdit: {crosses[0].label} stays as it is; give cross_replace_steps, such as 0.8")
        return found

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """See `Op.fits`; a share of the steps is none of them, a word is not in its prompt or in both, or prompts do
        not align."""
        super().fits(sampling, sites)
        for name, steps in self._ranges():
            if _some(steps):
                check_schedule(f"AttentionEdit: {name}", _range(name, steps), sampling.num_steps)
        selves = [site for site in sites if site.part != "cross"]
        if selves and _some(self.self_replace_steps):
            self._refuse_large(sampling, selves)
        if all(site.part == "self" for site in sites):
            return
        rows, source = sampling.taking(self)
        assert source is not None  # an edit names one
        for row in rows:
            own, other = sampling.prompt(row), sampling.prompt(source)
            known = self._aligned(sampling.family, other, own).known
            for word in self.word_steps:
                if not known[positions_of(sampling.family, own, word)].any():
                    raise UserError(
                        f"AttentionEdit: word_steps[{word!r}] changes nothing, for nothing in {other!r} stands for it; "
                        "leave it out"
                    )

    def renew(self) -> None:
        """Forgets alignments by another family's tokenizer."""
        self._known.clear()

    def _refuse_large(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        least = min(height * width for height, width in map(sampling.grid, sites))
        if least > self.self_tokens:
            raise UserError(
                f"AttentionEdit(self_tokens={self.self_tokens}): {describe(sites)} has {least} image tokens or more, "
                f"so that none is replaced; allowed: from {least}"
            )

    def _ranges(self) -> Iterator[tuple[str, Steps]]:
        """Names of the settings that say when something is replaced, and what they are."""
        yield "cross_replace_steps", self.cross_replace_steps
        yield "self_replace_steps", self.self_replace_steps
        yield from ((f"word_steps[{word!r}]", steps) for word, steps in self.word_steps.items())

    def attend(self, call: Call, attention: Attention) -> Tensor | None:
        """The probabilities A*, see above."""
        layout, (height, width) = attention.layout, attention.layout.grid
        small = height * width <= self.self_tokens and _now(self.self_replace_steps, call.moment)
        takes_self = call.site.part != "cross" and small
        shares = None if layout.text is None else self._shares(call)
        takes_text = shares is not None and any(bool(share.any()) for share in shares)
        if not takes_self and not takes_text:
            return None
        own, other = (attention.probabilities(rows) for rows in (call.positions, call.source))
        new = own.clone()
        if takes_self:
            new[:, :, layout.image, layout.image] = other[:, :, layout.image, layout.image]
        if takes_text and shares is not None:
            for i, share in enumerate(shares):
                matrix = self._alignment(call, i).matrix.to(own)
                text = own[i, :, layout.image, layout.text]
                taken = other[i, :, layout.image, layout.text] @ matrix
                new[i, :, layout.image, layout.text] = torch.lerp(text, taken, share.to(own))
        return new

    def _shares(self, call: Call) -> list[Tensor]:
        """alpha of each row in this step (tokens,)."""
        shares = []
        for i, position in enumerate(call.positions):
            share = self._alignment(call, i).known * _now(self.cross_replace_steps, call.moment)
            for word, steps in self.word_steps.items():
                at = positions_of(call.family, call.prompt(position), word)
                share[at] = self._alignment(call, i).known[at] * _now(steps, call.moment)
            shares.append(share)
        return shares

    def _alignment(self, call: Call, i: int) -> Alignment:
        return self._aligned(call.family, call.prompt(call.source[i]), call.prompt(call.positions[i]))

    def _aligned(self, family: Family, source: str, target: str) -> Alignment:
        if (source, target) not in self._known:
            self._known[source, target] = aligned(family, source, target, self.how)
        return self._known[source, target]


@dataclass(frozen=True, kw_only=True)
class Reweight(AttentionOp):
    """Has the picture attend more, or less, to words of its prompt; rows no longer sum to one.

    Reweight("cross", weights={"fluffy": 3.0})

    Attributes:
        weights: of words, or of several that follow one another; 0 for no attention at all.
    """

    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError without weights other than 1, or for one that is not finite."""
        super().__post_init__()
        if all(weight == 1 for weight in self.weights.values()):
            raise UserError(f"Reweight(weights={self.weights}) changes nothing; give others, such as {{'fluffy': 3.0}}")
        for word, weight in self.weights.items():
            check_finite(self, f"weights[{word!r}]", weight)

    def check(self, site: Site) -> None:
        """Raises UserError for an attention that reads no text."""
        _reads_text(site, self)

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """See `Op.fits`; a word is not in its prompt."""
        super().fits(sampling, sites)
        for row in sampling.taking(self)[0]:
            for word in self.weights:
                positions_of(sampling.family, sampling.prompt(row), word)

    def attend(self, call: Call, attention: Attention) -> Tensor | None:
        """The probabilities of image queries times the weights of their keys."""
        new = attention.probabilities(call.positions).clone()
        for i, position in enumerate(call.positions):
            text = new[i, :, attention.layout.image, attention.layout.text]
            for word, weight in self.weights.items():
                text[..., positions_of(call.family, call.prompt(position), word)] *= weight
        return new


def token_maps(attention: Attention, rows: list[int]) -> Tensor:
    """(len(rows), heads, tokens, h, w): how much each image token attends to each text token."""
    layout = attention.layout
    return attention.probabilities(rows)[:, :, layout.image, layout.text].mT.unflatten(-1, layout.grid)


def check_resolution(op: Op, resolution: int | None, sampling: Sampling, sites: Sequence[Site]) -> None:
    """Raises UserError for a resolution that none of an op's maps will have."""
    sizes = sorted({max(sampling.grid(site)) for site in sites}, reverse=True)
    if resolution is not None and resolution not in sizes:
        raise UserError(
            f"{type(op).__name__}(resolution={resolution}): {describe(sites)} has maps of "
            f"{', '.join(map(str, sizes))}; allowed: one of these, or None"
        )


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (b, tokens, h, w) of another size; bilinear."""
    same = maps.shape[-2:] == size
    return maps if same else functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def _reads_text(site: Site, op: AttentionOp) -> None:
    """Raises UserError for an attention that reads no text."""
    if site.part not in ("cross", "joint"):
        raise UserError(f"{type(op).__name__}: {site.label} reads no text; name cross-attention or joint attention")


def _range(name: str, steps: Steps) -> tuple[int, int] | tuple[float, float]:
    """Half-open, as of `Op.steps`.

    Raises:
        UserError: out of range.
    """
    if not isinstance(steps, (int, float)):
        check_range(name, steps)
        return steps
    if not 0 <= steps <= 1:
        raise UserError(
            f"{name}={steps}: allowed: a share of the steps in [0, 1], or a range such as (0, 5) or (0.2, 1.0)"
        )
    return 0.0, float(steps)


def _some(steps: Steps) -> bool:
    low, high = _range("steps", steps)
    return low < high


def _now(steps: Steps, moment: Moment) -> bool:
    return _some(steps) and moment.within(_range("steps", steps))
