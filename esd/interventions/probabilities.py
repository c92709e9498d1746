"""Attention probabilities as they are computed, seen and changed without another attention processor.

Diffusers computes every attention by `torch.nn.functional.scaled_dot_product_attention`, whoever its processor is. An
`Interception` meets that function while a site is called, gives softmax(Q Kᵀ scale + mask) in float32 to whoever
listens, and multiplies it with V itself for those rows of the batch alone that somebody changed. All other rows get
what the function gives, so that looking changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from esd.errors import UserError

_MOST = 2**26  # probabilities at a time: 256 MiB


@dataclass(frozen=True)
class Layout:
    """Which queries and keys of an attention are what.

    Attributes:
        image: queries, and keys of self and joint attention, that are image tokens.
        text: keys that are text tokens; None where there are none.
        grid: (h, w) of the image tokens, row by row.
    """

    image: slice
    text: slice | None
    grid: tuple[int, int]

    @classmethod
    def of(cls, queries: int, keys: int, text: int | None, text_first: bool, grid: tuple[int, int]) -> Layout:
        """Where the queries are image tokens, or text and image tokens in one of both orders.

        Args:
            queries, keys: how many there are.
            text: text tokens among the keys; None where there are none.
            text_first: whether they stand before the image tokens, where the keys have both.
            grid: (h, w) of the picture, of which image tokens are as many or a quarter, a sixteenth, ...
        """
        if text is None or text == keys:
            image, words = slice(0, queries), None if text is None else slice(0, keys)
        elif text_first:
            image, words = slice(text, queries), slice(0, text)
        else:
            image, words = slice(0, queries - text), slice(keys - text, keys)
        return cls(image, words, _halved(grid, image.stop - image.start))


@dataclass
class Attention:
    """Some heads of an attention under way: softmax(Q Kᵀ scale + mask) V.

    Attributes:
        query: (b, heads, queries, d).
        key, value: (b, heads, keys, d).
        mask: added to Q Kᵀ scale, float32, as (b, heads, queries, keys) or what broadcasts to it; None for none.
        scale: of Q Kᵀ.
        layout: see `Layout`.
        first: number of the first of these heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    layout: Layout
    first: int = 0
    _now: dict[int, Tensor] = field(default_factory=dict)  # row to its probabilities
    _changed: set[int] = field(default_factory=set)

    def probabilities(self, rows: Sequence[int]) -> Tensor:
        """(len(rows), heads, queries, keys), float32, as the ops so far have left them; not to be written into."""
        if missing := [row for row in dict.fromkeys(rows) if row not in self._now]:
            with torch.autocast(self.query.device.type, enabled=False):
                scores = self.query[missing].float() @ self.key[missing].float().mT * self.scale
                if self.mask is not None:
                    shape = (len(self.query), *scores.shape[1:])
                    scores = scores + self.mask.expand(shape)[missing]
                found = scores.softmax(dim=-1)
            self._now |= dict(zip(missing, found, strict=True))
            if missing == list(rows):
                return found
        return torch.stack([self._now[row] for row in rows])

    def put(self, rows: Sequence[int], probabilities: Tensor) -> None:
        """Other probabilities for some rows of the batch."""
        self._now |= dict(zip(rows, probabilities, strict=True))
        self._changed.update(rows)

    def output(self, own: Tensor) -> Tensor:
        """(b, heads, queries, d): `own`, with probabilities times values in the rows that were changed."""
        if not self._changed:
            return own
        rows = sorted(self._changed)
        with torch.autocast(own.device.type, enabled=False):
            new = self.probabilities(rows) @ self.value[rows].float()
        return own.index_copy(0, torch.tensor(rows, device=own.device), new.to(own.dtype))


Arrange = Callable[[int, int], Layout]  # numbers of queries and keys -> layout
Listener = Callable[[Attention], None]


class Interception(TorchFunctionMode):
    """Meets the attention of the site under way.

    It is in force only while a site is called: for the length of a `with` block it would miss blocks that are computed
    again on the way back, since torch leaves a mode for the length of `backward`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._site: tuple[str, Arrange, Listener] | None = None
        self._met = 0

    def expect(self, label: str, layout: Arrange, listener: Listener) -> None:
        """The attention that comes next is a site's."""
        self.forget()
        self._site, self._met = (label, layout, listener), 0
        self.__enter__()

    def forget(self) -> None:
        """No site is called any more."""
        if self._site is not None:
            self._site = None
            self.__exit__(None, None, None)

    def settle(self) -> None:
        """The site has returned.

        Raises:
            UserError: it did not compute its attention in a way that can be met.
        """
        site = self._site
        self.forget()
        if site is not None and self._met != 1:
            raise UserError(
                f"{site[0]} called torch's scaled_dot_product_attention {self._met} times, not once, so that its "
                "attention probabilities cannot be told; set the default attention processor and the native backend "
                "(denoiser.set_default_attn_processor(), denoiser.set_attention_backend('native'))"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function comes by here while a site is called; only one is met."""
        if self._site is None or func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self._met += 1
        own = func(*args, **(kwargs or {}))
        return self._heard(own, *self._site[1:], *args, **(kwargs or {}))

    def _heard(
        self,
        own: Tensor,
        layout: Arrange,
        listener: Listener,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The output (b, heads, queries, d), after the listener had its say, a few heads at a time."""
        if dropout_p:
            raise UserError(f"attention drops out {dropout_p:g} of its probabilities; call denoiser.eval() first")
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        mask = _added(query, key, attn_mask, is_causal)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        arranged = layout(query.shape[2], key.shape[2])
        parts = []
        for heads in _portions(query, key):
            masked = mask[:, heads] if mask is not None and mask.shape[1] > 1 else mask
            attention = Attention(
                query[:, heads], key[:, heads], value[:, heads], masked, factor, arranged, heads.start
            )
            listener(attention)
            parts.append(attention.output(own[:, heads]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _portions(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Heads, as many at a time as keep their probabilities small."""
    batch, heads, queries, _ = query.shape
    step = max(1, _MOST // (batch * queries * key.shape[2]))
    return (slice(begin, min(begin + step, heads)) for begin in range(0, heads, step))


def _added(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """A mask as something to add, float32 with four axes; None for none."""
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.float()[(None,) * (4 - mask.ndim)]


def _halved(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """(h, w) of so many tokens that a picture of this size was halved to; one row of them if it never was."""
    height, width = grid
    while height * width > count:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == count else (1, count)
