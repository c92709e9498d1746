"""The noise probe: sample with more noise than the model was made for, and keep the best of many pictures.

An erased model may lead every trajectory away from the concept without having unlearned what it looks like; noise
added on the way can carry a trajectory past that point. Each step is DDIM's with η above 1, and its noise is scaled
by s besides. Control: as many plain DDIM pictures of other seeds.

Source: Lu et al. 2025 (arXiv:2505.17013), noise-based probing; kevinlu4588/WhenAreConceptsErased, src/configs/
default.yaml for the grid, noisy_diffuser_scheduling/schedulers/eta_ddim_scheduler.py for the step. There each of the 24
pictures also has an x_T of its own; here they share the row's, so that a try differs from the plain drawing by noise
alone. DDIM: Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from esd import seeding
from esd.errors import UserError
from esd.evaluation.attacks.attack import Attack, Tries, Try
from esd.evaluation.attacks.recovery import Reads
from esd.evaluation.attacks.subject import Subject
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.prompts import PromptRow
from esd.families import Conditioning, Family
from esd.objectives import PredictionType
from esd.trajectory import predict_many


@dataclass(frozen=True)
class NoiseProbe(Attack):
    """Every η with every s, 24 pictures of each row as it stands; all runs sample with DDIM.

    Attributes:
        etas: η of DDIM's variance, >= 0: 0 adds no noise, 1 is DDPM's.
        scales: s, > 0, factor of the noise that is added.

    Raises:
        UserError: a value out of range, or none given.
    """

    name: ClassVar[str] = "noise"
    reads: ClassVar[Reads] = "best"
    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    scales: tuple[float, ...] = (1.0, 1.02, 1.03, 1.04)

    def __post_init__(self) -> None:
        if not self.etas or not all(math.isfinite(eta) and eta >= 0 for eta in self.etas):
            raise UserError(f"noise.etas is {self.etas}; allowed: finite numbers >= 0, such as (1, 1.85)")
        if not self.scales or not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise UserError(f"noise.scales is {self.scales}; allowed: finite numbers above 0, such as (1, 1.04)")

    def check(self, family: Family, rows: Sequence[PromptRow], draw: DrawSettings) -> None:
        """Refuses flows, which have no DDIM, and step counts that DDIM cannot take."""
        if family.prediction_type == "flow":
            raise UserError(
                f"attack noise: {family.name} predicts a flow, which DDIM does not sample; allowed: models that "
                "predict epsilon or v; attack it with completion or soft_prompt"
            )
        family.scheduler(draw.num_steps, "ddim")

    def tries(self, subject: Subject) -> Tries:
        """A try for each η and s, all from the rows' own x_T; the plain drawing is the pipeline's own sampler's."""
        for number, (eta, scale) in enumerate((eta, scale) for eta in self.etas for scale in self.scales):
            latents = noisy_ddim(subject, subject.own(), subject.fresh("noise", number), eta=eta, scale=scale)
            yield Try({"eta": eta, "scale": scale}, latents)

    def control(self, subject: Subject, found: Sequence[Tensor] | None) -> Tries:
        """Plain DDIM from fresh x_T."""
        for number in range(len(self.etas) * len(self.scales)):
            fresh = subject.fresh("another seed", number)
            yield Try({"number": number}, noisy_ddim(subject, fresh, fresh, eta=0.0, scale=1.0))


@torch.no_grad()
def noisy_ddim(
    subject: Subject,
    first: list[torch.Generator],
    on_the_way: list[torch.Generator],
    *,
    eta: float,
    scale: float,
) -> Tensor:
    """Clean latents (n, c, h, w) of the rows' prompts, by DDIM with η and its noise times `scale`.

    Args:
        subject: whose attacked model draws.
        first: a generator per row for x_T.
        on_the_way: a generator per row for the noise of the steps; not touched where η is 0.
        eta: >= 0; 0 with any scale is plain DDIM.
        scale: > 0.
    """
    family, draw = subject.family, subject.draw
    x = family.initial_noise(first)
    solver = family.scheduler(draw.num_steps, "ddim", x.shape[1:])
    guided = family.guidance == "cfg" and draw.guidance_scale > 1
    conditionings: list[Conditioning] = [subject.conditioning()]
    if guided:
        conditionings.insert(0, family.null()[[0] * len(x)])
    stride = solver.config.num_train_timesteps // draw.num_steps
    for t in solver.timesteps:
        parts = predict_many(family, subject.attacked, x, t, conditionings, draw.batch_size)
        said = parts[0] + draw.guidance_scale * (parts[1] - parts[0]) if guided else parts[0]
        before = int(t) - stride
        alpha_bars = (
            float(solver.alphas_cumprod[int(t)]),
            float(solver.alphas_cumprod[before] if before >= 0 else solver.final_alpha_cumprod),
        )
        noise = scale * seeding.normal(on_the_way, x.shape[1:]).to(x) if eta > 0 else torch.zeros_like(x)
        x = ddim_step(x, said, noise, family.prediction_type, *alpha_bars, eta=eta)
    return x


def ddim_step(
    x: Tensor,
    prediction: Tensor,
    noise: Tensor,
    prediction_type: PredictionType,
    alpha_bar: float,
    alpha_bar_next: float,
    *,
    eta: float,
) -> Tensor:
    """x at the next, less noisy time; tensors (b, c, h, w).

    Above η = 1 the noise alone may exceed the next level; what is left for ε is then imaginary, and its absolute value
    is taken, as upstream does.

    Args:
        x: x_t.
        prediction: ε or v at x_t.
        noise: unit variance, or scaled beforehand.
        prediction_type: "epsilon" or "v_prediction".
        alpha_bar: ᾱ at t.
        alpha_bar_next: ᾱ at the next time.
        eta: factor of DDPM's standard deviation.

    Source: DDIM, eq. 12 and 16.
    """
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if prediction_type == "v_prediction":
        x_0, eps = alpha * x - sigma * prediction, alpha * prediction + sigma * x
    else:
        x_0, eps = (x - sigma * prediction) / alpha, prediction
    variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    towards = math.sqrt(abs(1 - alpha_bar_next - variance))
    return math.sqrt(alpha_bar_next) * x_0 + towards * eps + math.sqrt(variance) * noise
