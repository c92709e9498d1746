"""Variance-preserving diffusion under classifier-free guidance: schedulers by name, and ᾱ. The counterpart of
`esd.families.mmdit`'s flows; what is shared by models that predict ε or v, whatever their network.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from esd.errors import UserError
from esd.objectives import PredictionType

from .base import Guidance, check_steps
from .pipeline import PipelineFamily

SCHEDULERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class DiffusionFamily(PipelineFamily):
    """What all families that predict ε or v share.

    Args:
        pipe: the pipeline; only its denoiser is ever changed, and only by `esd.weights` or `esd.checkpoint`.
        sample_shape: (c, h, w) of a latent of the model's own size.

    Raises:
        UserError: the scheduler's prediction type is neither epsilon nor v_prediction, or a text encoder is missing.
    """

    def __init__(self, pipe: Any, sample_shape: tuple[int, int, int]) -> None:
        kind = pipe.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"the scheduler predicts {kind!r}; supported: epsilon, v_prediction")
        super().__init__(pipe, sample_shape)
        self.guidance: Guidance = "cfg"
        self.prediction_type: PredictionType = kind
        self._alpha_bars = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.float()

    def scheduler(self, num_steps: int, name: str | None = None, latent_shape: Sequence[int] | None = None) -> Any:
        """A fresh scheduler made from the pipeline's configuration; see `Family.scheduler`."""
        config = self.pipe.scheduler.config
        check_steps(num_steps, config.num_train_timesteps)
        if name is None:
            scheduler = type(self.pipe.scheduler).from_config(config)
        elif name in SCHEDULERS:
            kind = getattr(diffusers, SCHEDULERS[name])
            takes_clip = "clip_sample" in inspect.signature(kind.__init__).parameters
            # latents are not confined to [-1, 1]: DDIM's and DDPM's default would clip them
            scheduler = kind.from_config(config, **({"clip_sample": False} if takes_clip else {}))
        else:
            raise UserError(f"scheduler is {name!r}; allowed: {', '.join(SCHEDULERS)}, or none for the model's own")
        try:
            scheduler.set_timesteps(num_steps, device=self.device)
        except ValueError as error:  # PNDM's Runge-Kutta start, which SDXL's configuration does not skip, takes four
            raise UserError(f"num_steps is {num_steps}: {type(scheduler).__name__} needs more, such as 50") from error
        if scheduler.timesteps.max() >= config.num_train_timesteps:  # where spacing and steps_offset add up so
            raise UserError(
                f"num_steps is {num_steps}: {type(scheduler).__name__} would visit t = "
                f"{scheduler.timesteps.max():g}, and the model knows 0 to {config.num_train_timesteps - 1}; take "
                "fewer steps, such as 50"
            )
        return scheduler

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(ᾱ_t), sqrt(1 - ᾱ_t)); a fractional t, which Euler's times can be, interpolates ᾱ."""
        table = self._alpha_bars.to(t.device)
        t = t.float().clamp(0, len(table) - 1)
        low = t.floor().long()
        alpha_bar = torch.lerp(table[low], table[(low + 1).clamp_max(len(table) - 1)], t - low)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
