"""Where the erased model looks otherwise: attention to each text token, before and after, from the same x_t.

Both models get the base's x_t at every step; a map says how much each place of the picture attends to each token, mean
over heads and layers. What leaves the concept's token goes to other words, or to the start, the end and the padding,
which mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esd.families import Denoiser, Family
from esd.interventions import AttentionMaps, attach, resolve, sample
from esd.interventions.sites import is_attention
from esd.interventions.words import positions_of
from esd.trajectory import first_stages

GROUPS = ("concept", "other words", "no word")


@dataclass(frozen=True)
class Gaze:
    """Attention to the tokens of some prompts.

    Attributes:
        prompts: b of them.
        base, erased: (b, tokens, h, w), mean over steps, layers and heads; over tokens they sum to one in
            cross-attention, and to what is left for the text in joint attention.
    """

    prompts: Sequence[str]
    base: Tensor
    erased: Tensor


@torch.no_grad()
def gaze(
    family: Family,
    base: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
) -> Gaze:
    """Attention of base and erased model on the base's trajectories.

    Args:
        family: whose denoiser wears erased weights.
        base: the base under them; see `esd.checkpoint.base_view`.
        prompts, seeds: what the base draws, b of each.
        num_steps, guidance_scale: of sampling.
    """
    sites = [site for site in resolve(family, "all", is_attention) if site.part in ("cross", "joint")]
    cond = family.encode(list(prompts))
    passed = sample(
        family, prompts, seeds, num_steps=num_steps, guidance_scale=guidance_scale, denoiser=base
    ).trajectory  # fmt: skip
    entries = first_stages(family.scheduler(num_steps, latent_shape=passed.inputs.shape[2:]))

    def mean(denoiser: Denoiser) -> Tensor:
        found = []
        for entry in entries:
            maps = AttentionMaps(sites)
            with attach(family, maps):
                family.predict(denoiser, passed.inputs[entry], passed.t[entry, 0], cond)
            found.append(maps.maps.mean())
        return torch.stack(found).mean(0)

    return Gaze(prompts, mean(base), mean(family.denoiser))


def groups(family: Family, prompt: str, word: str) -> dict[str, list[int]]:
    """Text tokens of a prompt by what they stand for: the concept, other words, or no word at all.

    Args:
        family: of the model.
        prompt: that holds the word.
        word: of the concept.
    """
    spans = [span for segment in family.token_spans(prompt) for span in segment]
    own = positions_of(family, prompt, word)
    others = [i for i, span in enumerate(spans) if span and i not in own]
    return dict(zip(GROUPS, (own, others, [i for i, span in enumerate(spans) if not span]), strict=True))


def masses(family: Family, seen: Gaze, word: str) -> list[dict[str, Any]]:
    """A row for each prompt and group of tokens: the mean attention to it, over the picture, before and after."""
    rows = []
    for i, prompt in enumerate(seen.prompts):
        for group, tokens in groups(family, prompt, word).items():
            before, after = (float(maps[i, tokens].sum(0).mean()) for maps in (seen.base, seen.erased))
            rows.append({"prompt": prompt, "tokens": group, "base": before, "erased": after, "moved": after - before})
    return rows
