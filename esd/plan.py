"""What a run trains and how, as one value: checked when it is made, passed to all that needs it, and part of the
checkpoint's provenance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from esd.errors import UserError
from esd.lora import Lora
from esd.objectives import Objective
from esd.sources import Sampling


@dataclass(frozen=True)
class TrainPlan:
    """Everything that decides the erased weights, besides the base; `esd.config.train_sections` has the defaults.

    Attributes:
        concepts: what is erased; provenance only, `prompts` is what is trained on.
        prompts: training prompts that name the concepts; taken in turn, and one may stand several times.
        erase_from: () or as many prompts: erase the concept only as an attribute of these.
        preserve: prompts whose prediction should stay; () for none.
        preserve_weight: of that term.
        selection: expression for the trained parameters.
        lora: train an adapter beside them; None trains them themselves.
        frozen: "float8" stores the weights beside which an adapter is trained in a byte each; None as they are.
        masters: learn in float32 whatever the base's precision; False learns in the base's own.
        objective: anchor, eta, weighting.
        sampling: how x_t is drawn.
        sampler: who draws it, the "student" (the paper) or the "teacher".
        sample_with: prompt of the rollouts where erase_from is set.
        rollouts: in the bank; 0 keeps none and rolls out anew.
        reuse: of a point in the bank.
        staleness: updates that points drawn by the student serve; None where the teacher draws them.
        updates: optimizer steps.
        batch_size: points per forward pass and process.
        gradient_accumulation: forward passes per update.
        lr: learning rate; lr_schedule "constant", "cosine" or "linear" after `warmup` updates.
        betas: of Adam.
        weight_decay: share of the way back to the base per update, times lr.
        clip_norm: largest gradient norm, 0 for no limit.
        optimizer: "adam", or "adam8bit" with its moments in 8 bits.
        gradient_checkpointing: less memory, more time, same gradients.
        compile: compile the blocks that repeat in the denoiser, for speed.
        save_every: updates between resumable states, 0 for none but when stopped.
        seed: of every draw.

    Raises:
        UserError: prompts to erase from without the anchor "erase_from", or the other way round; the student as
            sampler without a staleness, or the other way round; a prompt is both trained on and preserved; frozen
            weights in float8 without an adapter.
    """

    concepts: tuple[str, ...]
    prompts: tuple[str, ...]
    erase_from: tuple[str, ...]
    preserve: tuple[str, ...]
    preserve_weight: float
    selection: str
    lora: Lora | None
    frozen: Literal["float8"] | None
    masters: bool
    objective: Objective
    sampling: Sampling
    sampler: Literal["student", "teacher"]
    sample_with: Literal["erase_from", "concept"]
    rollouts: int
    reuse: int
    staleness: int | None
    updates: int
    batch_size: int
    gradient_accumulation: int
    lr: float
    lr_schedule: Literal["constant", "cosine", "linear"]
    warmup: int
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    optimizer: Literal["adam", "adam8bit"]
    gradient_checkpointing: bool
    compile: bool
    save_every: int
    seed: int

    def __post_init__(self) -> None:
        if bool(self.erase_from) != (self.objective.anchor == "erase_from"):
            raise UserError(
                f"objective.anchor={self.objective.anchor} with erase_from={list(self.erase_from)}; prompts to erase "
                "from and the anchor erase_from go together"
            )
        if (self.sampler == "student") != (self.staleness is not None):
            raise UserError(
                f"sampler={self.sampler} with staleness={self.staleness}; points drawn by the student and a staleness, "
                "such as 1, go together"
            )
        if self.frozen and self.lora is None:
            raise UserError(
                f"frozen={self.frozen} without an adapter: weights that are trained are not frozen; give a Lora, or "
                "leave it out"
            )
        if both := set(self.erase_from or self.prompts) & set(self.preserve):
            raise UserError(
                f"preserve.prompts: {min(both)!r} is a training prompt too, so that it would be erased and preserved; "
                "leave it out of one of them"
            )
