"""The erasing objective: one target, one loss, and what both mean in ε-, v- and flow-prediction.

ESD teaches a student denoiser to answer the concept's prompt with classifier-free guidance run *backwards*:

    target = anchor - η (concept - null)

where the three right-hand terms are predictions of the frozen teacher at one noisy latent x_t. The
coefficients sum to one (1 - η + η), so an affine change of parametrisation, the same for every term, passes
straight through: the target computed from v-predictions *is* the v-form of the target computed from
ε-predictions. The squared error does not pass through; `weight` says by how much.

Write x_t = α x_0 + σ ε. Then, for two predictions at the same x_t,

    Δv    = Δε / α    (variance preserving, α² + σ² = 1,  v = α ε - σ x_0)
    Δflow = Δε / α    (rectified flow,      α + σ = 1,    v = ε - x_0)
    Δx_0  = -(σ/α) Δε

so MSE_v = MSE_ε / ᾱ and MSE_flow = MSE_ε / (1-σ)², both "divide by α²". docs/objective.md derives all of it.

Source: Gandikota et al., "Erasing Concepts from Diffusion Models", ICCV 2023, eq. 6-7 (arXiv:2303.07345);
v-prediction: Salimans & Ho 2022 (arXiv:2202.00512), appendix D; flow: Liu et al. 2022 (arXiv:2209.03003);
min-SNR: Hang et al. 2023 (arXiv:2303.09556).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from .errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "flow"]
Anchor = Literal["null", "concept", "erase_from"]
Weighting = Literal["native", "eps", "v", "x0", "min_snr"]

MIN_SNR_GAMMA = 5.0
_SMALLEST = 1e-12  # α² of a zero-terminal-SNR schedule is 0 at t = T; every limit we need is finite above this


@dataclass(frozen=True)
class Objective:
    """What the student is taught; every choice is explicit because upstream's scripts disagree on it.

    Attributes:
        anchor: where η = 0 leads: "null" (the paper; the unconditional prediction), "concept" (upstream's
            scripts since 2024; with it, η there is 1 + η here: same target), or "erase_from" (the prediction
            for the prompt that the concept is erased from).
        eta: erasing guidance η, finite and >= 0. The paper's is 1.
        weighting: the space whose mean squared error is minimised: "native" (the model's own
            parametrisation), "eps", "v", "x0", or "min_snr" (x0 error weighted by min(SNR, 5)).
        null: what the null prompt is, "empty" or "zeros"; None for what the model's pipeline takes.
        embedded_guidance: the scale that teacher and student are told, on models distilled for one
            (FLUX.1-dev), finite and >= 0. Upstream's is 1, whatever x_t was sampled with.

    Raises:
        UserError: a field is outside its range.
    """

    anchor: Anchor = "null"
    eta: float = 1.0
    weighting: Weighting = "native"
    null: Literal["zeros", "empty"] | None = None
    embedded_guidance: float = 1.0

    def __post_init__(self) -> None:
        for field, allowed in (("anchor", get_args(Anchor)), ("weighting", get_args(Weighting))):
            if getattr(self, field) not in allowed:
                raise UserError(f"objective.{field} is {getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        for field in ("eta", "embedded_guidance"):
            number = getattr(self, field)
            if not (math.isfinite(number) and number >= 0):
                raise UserError(f"objective.{field} is {number}; it must be a finite number >= 0, such as 1")


def target(anchor: Tensor, concept: Tensor, null: Tensor, *, eta: float) -> Tensor:
    """What the student should predict: ``anchor - eta * (concept - null)``, float32 (b, ...).

    Args:
        anchor: teacher's prediction to stay at when eta = 0: that of the null prompt (the paper), of the
            concept, or, with `erase_from`, of the prompt the attribute is erased from.
        concept: teacher's prediction for the concept.
        null: teacher's prediction for the empty prompt.
        eta: erasing guidance η >= 0.

    Source: ESD eq. 7; `erase_from` is upstream's generalisation (rohitgandikota/erasing, esd_sd.py).
    """
    return anchor.float() - eta * (concept.float() - null.float())


def weight(weighting: Weighting, prediction_type: PredictionType, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Factor (b,) that turns the model's native squared error at (α, σ) into the error in the space asked
    for.

    Args:
        weighting: see `Objective`.
        prediction_type: what the model predicts.
        alpha: signal scale (b,); sqrt(ᾱ_t) for diffusion, 1 - σ for flow.
        sigma: noise scale (b,).
    """
    signal, noise = alpha.float().square().clamp_min(_SMALLEST), sigma.float().square().clamp_min(_SMALLEST)
    if weighting == "native":
        return signal.new_ones(signal.shape)
    to_eps = signal.new_ones(signal.shape) if prediction_type == "epsilon" else signal
    on_eps = {
        "eps": signal.new_ones(signal.shape),
        "v": 1 / signal,
        "x0": noise / signal,
        "min_snr": (MIN_SNR_GAMMA * noise / signal).clamp_max(1.0),
    }[weighting]
    return to_eps * on_eps


def loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Scalar float32: mean over the batch of weight_b times the mean square error of sample b.

    Args:
        prediction: student's prediction (b, ...), gradients flow through it.
        target: same shape; never receives a gradient.
        weight: (b,) or None for ones.

    Raises:
        ValueError: shapes differ (broadcasting here is always a bug).
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    per_sample = (prediction.float() - target.detach().float()).square().flatten(1).mean(1)
    if weight is None:
        return per_sample.mean()
    if weight.shape != per_sample.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the batch needs {tuple(per_sample.shape)}")
    return (weight.to(per_sample) * per_sample).mean()
