"""What a denoiser makes of a picture: its representations while it draws one, and those of a picture it is shown.

    drawn = generate(family, "a cat", extract_positions=["mid_block"])
    drawn.representations["mid_block"][-1]                              # (c, h, w), of the last step
    shown = img2repr(family, drawn.image, ["mid_block", "up_blocks[1]"], 100)
    shown["mid_block"]                                                  # (1, c, h, w), at t = 100
    similarity(concat(shown)[0], concat(shown)[0])                      # (H, W, H, W)

A position is a module by its path in the denoiser, `up_blocks[1].attentions[0]`, or an expression of `esd.selection`,
`up[1]`. Of one that stands for several modules it is the output of the last that runs: what goes on from there.

Source: JonasLoos/sdhelper 1.0.0, and a notebook on the spread of representations that uses it. What is otherwise here:
the VAE gets pictures in [-1, 1], as it was trained, not in [0, 1]; SDXL keeps its pooled prompt and time ids; the noise
of a time is the schedule's own, whatever the sampler did before; positions are parsed, not evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from esd import seeding
from esd.errors import UserError
from esd.families import Family
from esd.interventions import Record, Recording, Site, attach, layers, resolve, sample
from esd.trajectory import first_stages

Representations = dict[str, Tensor]  # position to (steps or noises, c, h, w), float32 on the CPU

_PATH = re.compile(r"\w+(\[\d+\]|\.\w+)*")


@dataclass(frozen=True)
class Generated:
    """A picture and what went on inside while it was drawn.

    Attributes:
        image: (3, H, W) in [0, 1].
        representations: position to (steps, c, h, w), of the prompt's own pass.
        t: scheduler times of the steps (steps,).
    """

    image: Tensor
    representations: Representations
    t: Tensor


def generate(
    family: Family,
    prompt: str,
    *,
    extract_positions: Sequence[str] = (),
    seed: int = 0,
    num_steps: int = 20,
    guidance_scale: float = 4.0,
) -> Generated:
    """Draws a picture and keeps the representations of every step.

    Args:
        family: of the model.
        prompt: to draw.
        extract_positions: see above; none keeps nothing.
        seed: of the noise.
        num_steps: sampling steps.
        guidance_scale: see `esd.trajectory.rollout`.

    Raises:
        UserError: no such position, or one whose output has no places in the picture.
    """
    sites = {position: site_of(family, position) for position in extract_positions}
    ops = [Record(list(sites.values()), on="cond")] if sites else []
    drawn = sample(family, [prompt], [seed], *ops, num_steps=num_steps, guidance_scale=guidance_scale)
    begins = first_stages(family.scheduler(num_steps))  # of a step with several evaluations the first is kept
    found = _found(ops[0].recording, sites, drawn.latents.shape[-2:]) if ops else {}
    return Generated(drawn.images[0].cpu(), found, drawn.trajectory.t[begins, 0].cpu())


@torch.no_grad()
def img2repr(
    family: Family,
    image: Tensor | np.ndarray,
    extract_positions: Sequence[str],
    step: float,
    *,
    prompt: str = "",
    seeds: Sequence[int] = (0,),
    batch_size: int = 32,
) -> Representations:
    """What one call of the denoiser makes of a picture, noised to a time: a row for each noise.

    Args:
        family: of the model, with denoiser and VAE on their device.
        image: (3, H, W) in [0, 1], or uint8 RGB (H, W, 3).
        extract_positions: see above.
        step: training time, from 0, at which diffusion has a little noise too, to the last of the schedule.
        prompt: that the denoiser is told.
        seeds: of what the picture is encoded and noised with, one for each row.
        batch_size: most rows in one call.

    Returns:
        position to (len(seeds), c, h, w).

    Raises:
        UserError: no such position, one whose output has no places in the picture, or a time that there is not.
    """
    check_time(family, step)
    if not extract_positions or not seeds:
        raise UserError("give at least one position, such as 'mid_block', and one seed")
    sites = {position: site_of(family, position) for position in extract_positions}
    pixels = as_pixels(image)[None]
    cond, t = family.encode([prompt]), torch.tensor([float(step)])
    alpha, sigma = (scale.to(family.device) for scale in family.alpha_sigma(t))
    parts = []
    for start in range(0, len(seeds), batch_size):
        sources = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        x_0 = family.encode_images(pixels, sources)
        noise = seeding.normal(sources, x_0.shape[1:]).to(x_0)
        with attach(family, record := Record(list(sites.values()))):
            x = alpha * x_0 + sigma * noise
            family.predict(family.denoiser, x, t.to(x_0)[0], cond[[0] * len(sources)])
        parts.append(_found(record.recording, sites, x_0.shape[-2:], rows=True))
    return {position: torch.cat([part[position] for part in parts]) for position in sites}


def concat(representations: Representations, positions: Sequence[str] | None = None) -> Tensor:
    """All channels at every place (n, C, H, W), the coarser grids repeated up to the size of the finest.

    Args:
        representations: with as many rows at every position.
        positions: which, in this order; None for all.
    """
    chosen = [representations[position] for position in positions or representations]
    size = max((tuple(x.shape[-2:]) for x in chosen), key=lambda edges: edges[0] * edges[1])
    return torch.cat([functional.interpolate(x, size, mode="nearest") for x in chosen], dim=1)


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of every place of one representation (c, h, w) with every place of another (c, h', w'): (h, w, h', w')."""
    first, second = (functional.normalize(x.float(), dim=0) for x in (one, other))
    return torch.einsum("chw,cij->hwij", first, second)


def spread(representations: Tensor) -> Tensor:
    """How far representations (n, c, h, w) of one picture under n noises lie apart at each place (h, w).

    The standard deviation over the noises, mean over the channels.
    """
    return representations.std(dim=0).mean(dim=0)


def channel_levels(representations: Tensor) -> Tensor:
    """Mean |value| of each channel of (n, c, h, w), largest first (c,)."""
    return representations.abs().mean(dim=(0, 2, 3)).sort(descending=True).values


def site_of(family: Family, position: str) -> Site:
    """The site whose output a position is.

    Args:
        family: of the model.
        position: path of a module, such as "up_blocks[1]", or an expression of `esd.selection`, such as "up[1]".

    Raises:
        UserError: there is no such place.
    """
    path = position.replace("[", ".").replace("]", "")
    if _PATH.fullmatch(position) and _module(family.denoiser, path) is not None:
        return resolve(family, f"name:{path}.*")[-1]
    try:
        return resolve(family, position)[-1]
    except UserError as error:
        blocks = [
            f"{name}[0..{len(module) - 1}]" if isinstance(module, nn.ModuleList) else name
            for name, module in family.denoiser.named_children()
            if isinstance(module, nn.ModuleList) or name.endswith("_block")
        ]
        raise UserError(f"position {position!r}: {error}; modules of this model: {', '.join(blocks)}") from None


def usual_positions(family: Family) -> list[str]:
    """Where representations are taken unless somebody says otherwise: in the middle, and half way from there on.

    The middle block and the second of the up blocks of a UNet; of a transformer the blocks that end the first half and
    the third quarter.
    """
    every = layers(family)
    if any(site.stack == "mid" for site in every):
        return ["mid_block", "up_blocks[1]"]
    ends = [(len(every) * share + 3) // 4 - 1 for share in (2, 3)]
    return list(dict.fromkeys(every[end].expression for end in ends))


def check_time(family: Family, step: float) -> None:
    """Raises UserError for a training time that there is not."""
    last = family.pipe.scheduler.config.num_train_timesteps - (family.prediction_type != "flow")  # flows reach it
    if not 0 <= step <= last:
        raise UserError(f"step={step}: allowed: training times from 0 to {last}, such as 100")


def as_pixels(image: Tensor | np.ndarray) -> Tensor:
    """A picture as (3, H, W), float32 in [0, 1], of one like it or of uint8 RGB (H, W, 3)."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255
    return image.float()


def _module(denoiser: nn.Module, path: str) -> nn.Module | None:
    try:
        return denoiser.get_submodule(path)
    except AttributeError:
        return None


def _found(
    recording: Recording, sites: Mapping[str, Site], latent: Sequence[int], rows: bool = False
) -> Representations:
    """By position (n, c, h, w), where n are the steps of the only row, or the rows of the only call."""
    kept = {position: recording.of(site.label) for position, site in sites.items()}  # (steps, rows, ...)
    return {position: _on_grid(position, x[0] if rows else x[:, 0], latent) for position, x in kept.items()}


def _on_grid(position: str, x: Tensor, latent: Sequence[int]) -> Tensor:
    """(n, c, h, w) of that or of tokens (n, h w, c), float32.

    Raises:
        UserError: neither.
    """
    if x.ndim == 4:
        return x.float()
    height, width = latent
    shrunk = round((height * width / x.shape[1]) ** 0.5) if x.ndim == 3 else 0
    if not shrunk or (height // shrunk) * (width // shrunk) != x.shape[1]:
        raise UserError(f"position {position!r}: its output {tuple(x.shape)} has no places in the picture; name blocks")
    return x.float().mT.unflatten(2, (height // shrunk, width // shrunk))
