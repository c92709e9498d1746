"""Ops on latents between steps: keep what an edit should not touch, and follow the gradient of a loss.

Both need this package's own sampling, `esd.interventions.sample`.

Source: local blend from prompt-to-prompt (arXiv:2208.01626); guidance by a loss from fast.ai's "Stable Diffusion Deep
Dive" notebook, whose step is the same in every parametrisation of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from esd.errors import UserError
from esd.families import Family
from esd.trajectory import clean

from .attention import MapKey, Maps, check_resolution, token_maps
from .clock import numbered
from .ops import AttentionOp, Call, Latents, Op, Sampling, Source, check_finite
from .probabilities import Attention
from .sites import Site
from .words import positions_of


@dataclass(frozen=True, kw_only=True)
class LocalBlend(AttentionOp):
    """Lets an edit change the picture only where some words are attended to: x <- x_src + m (x - x_src).

    m is the union of two masks, of the own and of the source's attention to those of the words that each prompt has:
    mean map over heads, places and steps so far -> 3 x 3 max-pool -> size of x -> / its largest value -> > threshold.

    LocalBlend("cross", source=Source("a cat and a rose", 0), words=["cat", "dog"])

    Attributes:
        where: attentions whose maps are taken.
        source: the prompt and seed that is edited, or the number of a sample in the batch.
        words: that the edit is about, of both prompts.
        resolution: see `AttentionMaps`.
        threshold: in [0, 1]; 0 blends next to nothing, 1 gives the source's picture.
        steps: those of which maps are taken, and after which latents are blended.
    """

    source: Source | int = field(default=0)
    words: Sequence[str] = ()
    resolution: int | None = None
    threshold: float = 0.3
    _maps: dict[int, Maps] = field(init=False, compare=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError without words, or for a threshold out of range."""
        super().__post_init__()
        if not self.words or isinstance(self.words, str):
            raise UserError(f"LocalBlend(words={self.words!r}): give the words that the edit is about, such as ['cat']")
        check_finite(self, "threshold", self.threshold)
        if not 0 <= self.threshold <= 1:
            raise UserError(f"LocalBlend(threshold={self.threshold}): allowed: 0 to 1")

    def check(self, site: Site) -> None:
        """Raises UserError for an attention that reads no text."""
        if site.part not in ("cross", "joint"):
            raise UserError(f"LocalBlend: {site.label} reads no text; name cross-attention or joint attention")

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """See `Op.fits`; a prompt has none of the words, or no attention the resolution."""
        super().fits(sampling, sites)
        check_resolution(self, self.resolution, sampling, sites)
        rows, source = sampling.taking(self)
        for row in [*rows, *(() if source is None else (source,))]:
            self._of(sampling.family, sampling.prompt(row))

    def renew(self) -> None:
        """Begins without maps."""
        self._maps.clear()

    def attend(self, call: Call, attention: Attention) -> None:
        """Adds both prompts' maps of the words; changes nothing."""
        grid = attention.layout.grid
        if call.moment.stage or self.resolution not in (None, max(grid)):
            return
        for row in dict.fromkeys([*call.positions, *call.source]):
            prompt = call.prompt(row)
            at = [i for word in self._of(call.family, prompt) for i in positions_of(call.family, prompt, word)]
            drawn = token_maps(attention, [row])[:, :, at].mean(2, keepdim=True)
            self._maps.setdefault(row % call.moment.rows, Maps()).add(MapKey(None, None, grid), drawn)

    def after_step(self, latents: Latents) -> Tensor | None:
        """The latents, with the source's outside of the mask."""
        x, changed = latents.x, latents.x.clone()
        masks = {row: self._mask(row, x) for row in {*latents.rows, *latents.source}}
        for row, source in zip(latents.rows, latents.source, strict=True):
            mask = masks[row] | masks[source]
            changed[row] = torch.where(mask, x[row], x[source])
        return changed

    def _of(self, family: Family, prompt: str) -> list[str]:
        """Those of the words that a prompt has."""
        found = []
        for word in self.words:
            try:
                positions_of(family, prompt, word)
                found.append(word)
            except UserError:
                continue
        if not found:
            raise UserError(f"LocalBlend: {prompt!r} has none of the words {', '.join(self.words)}; name some of both")
        return found

    def _mask(self, row: int, x: Tensor) -> Tensor:
        """(1, h, w), where the words of a sample are attended to."""
        pooled = functional.max_pool2d(self._maps[row].mean(), 3, stride=1, padding=1)
        mean = functional.interpolate(pooled, x.shape[-2:])[0].to(x.device)
        return mean / mean.max() > self.threshold


@dataclass(frozen=True, kw_only=True)
class Guide(Op):
    """Follows the gradient of a loss of the picture that is to come: x <- x - scale sigma^2 dL/dx.

    L = loss(decode(x0_hat)), x0_hat what the guided prediction at x makes of it. The prediction itself is taken as
    constant, so that gradients pass the decoder and not the denoiser; sigma is the noise in x, as the solver has it.

    Guide(loss=lambda image: (image[:, 2] - 0.9).abs().mean(), scale=50.0)  # blue

    Attributes:
        loss: of one picture (1, 3, H, W), float32, about [0, 1]; returns a scalar that gradients flow from.
        scale: how strongly.
        every: only in one step of so many; each of these costs a prediction and a pass through the decoder and back.
    """

    loss: Callable[[Tensor], Tensor] = field(repr=False)
    scale: float
    every: int = 1

    def __post_init__(self) -> None:
        """Raises UserError for a scale of 0 or that is not finite, or no whole number of steps."""
        super().__post_init__()
        check_finite(self, "scale", self.scale)
        check_finite(self, "every", self.every)
        if self.scale == 0:
            raise UserError("Guide(scale=0) changes nothing; allowed: a scale other than 0")
        if self.every < 1 or self.every % 1:
            raise UserError(f"Guide(every={self.every!r}): allowed: a whole number of steps from 1")
        if self.on != "both":
            raise UserError(f"Guide(on={self.on!r}): latents belong to no pass; leave `on`")

    def fits(self, sampling: Sampling, sites: Sequence[Site]) -> None:
        """See `Op.fits`; `every` leaves none of its steps."""
        super().fits(sampling, sites)
        if self.steps is not None:
            low, high = numbered("Guide: steps", self.steps, sampling.num_steps)
            if not any(step % self.every == 0 for step in range(low, high)):
                raise UserError(
                    f"Guide(every={self.every}): none of steps={self.steps} is a multiple of it; widen them"
                )

    def before_step(self, latents: Latents) -> Tensor | None:
        """The latents, one step down the gradient.

        Raises:
            UserError: no gradient flows from the loss to the picture.
        """
        if (latents.moment.step or 0) % self.every:
            return None
        x, family, rows = latents.x, latents.family, latents.rows
        prediction, changed = latents.predict(latents.solver, x, latents.t), x.clone()
        scaled = family.model_input(latents.solver, torch.ones_like(x[:1]), latents.t).mean()
        sigma = family.alpha_sigma(latents.t.expand(1))[1] / scaled
        for row in rows:
            with torch.enable_grad():
                own = x[row : row + 1].detach().requires_grad_()
                x_in = family.model_input(latents.solver, own, latents.t)
                loss = self.loss(family.render(clean(family, x_in, latents.t, prediction[row : row + 1])))
                if not loss.requires_grad:
                    raise UserError(
                        "Guide: no gradient flows from the loss to the picture; compute it by torch functions"
                    )
                (gradient,) = torch.autograd.grad(loss, own)
            changed[row] -= (self.scale * sigma**2 * gradient)[0].to(x)
        return changed
