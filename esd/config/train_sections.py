"""The sections of `esd.train`'s settings, and what cannot go together in them."""

from __future__ import annotations

from dataclasses import dataclass

from esd.config.options import option
from esd.errors import UserError

SCHEDULERS = ("ddim", "ddpm", "dpm++", "euler", "euler_a", "heun", "lms", "pndm", "unipc")
STALENESS = 8  # updates that a bank filled by the student serves unless told otherwise


@dataclass
class ObjectiveConfig:
    """What the student is taught; see `esd.objectives`."""

    anchor: str | None = option(
        "null",
        "prediction to start from: the empty prompt's or the concept's own; with erase_from it is that prompt's",
        one_of=("null", "concept", "erase_from"),
    )
    eta: float = option(1.0, "erasing guidance: how far to push away from the concept", at_least=0)
    weighting: str = option(
        "native",
        "space whose squared error is minimised; native is the model's own",
        one_of=("native", "eps", "v", "x0", "min_snr"),
    )
    null: str | None = option(
        None,
        "what the null prompt is; null takes the model's own, which is zeros for SDXL and empty for all others",
        one_of=("zeros", "empty"),
    )
    embedded_guidance: float = option(
        1.0, "guidance scale that teacher and student are told, on a model distilled for one (FLUX.1-dev)", at_least=0
    )


@dataclass
class PreserveConfig:
    """What must stay; see `esd.learner`."""

    prompts: list[str] = option(
        [],
        "prompts whose prediction should stay as it was; {thing} and {style} expand to "
        "all the model knows but the erased",
    )
    weight: float = option(1.0, "of this term beside the erasing term", at_least=0)


@dataclass
class WeightsConfig:
    """What is trained: the selected weights themselves, or thin products beside them (LoRA)."""

    kind: str = option("full", "full trains the selected weights, lora an adapter beside them", one_of=("full", "lora"))
    rank: int | None = option(None, "of the adapter's products, such as 16; for lora", at_least=1)
    alpha: float | None = option(None, "the products are scaled by alpha / rank; null is the rank; for lora", above=0)
    frozen: str | None = option(
        None,
        "how the frozen weights are stored: null is as model.precision has them, float8 a byte for each; for lora",
        one_of=("float8",),
    )
    masters: bool = option(
        True, "learn in float32 over a bfloat16 base; false learns in bfloat16, as upstream, and loses small steps"
    )


@dataclass
class TrajectoryConfig:
    """Where training points come from; see `esd.sources`."""

    sampler: str = option(
        "teacher",
        "who draws x_t: student is the paper, teacher is the frozen base and lets a bank "
        "of rollouts serve many updates",
        one_of=("student", "teacher"),
    )
    num_steps: int = option(20, "sampling steps of a rollout", at_least=1, at_most=1000)
    guidance_scale: float = option(
        3.0, "guidance while sampling x_t; 1 or less is none. FLUX.1-dev is told this scale", at_least=0
    )
    negative: str | None = option(
        None, "negative prompt while sampling x_t; null is the objective's", one_of=("zeros", "empty")
    )
    time_rule: str = option(
        "visited",
        "which t goes with x_t; the other rules are upstream's",
        one_of=("visited", "index", "compvis", "alt"),
    )
    scheduler: str | None = option(None, "of the rollouts; null takes the model's own", one_of=SCHEDULERS)
    scaled_input: bool = option(
        True, "show the denoiser x_t as the scheduler scales it; false is upstream's SDXL script, which does not"
    )
    size: int | None = option(
        None, "edge in pixels of the square pictures rolled out; null is the model's own", at_least=1
    )
    sample_with: str = option(
        "erase_from", "prompt of the rollouts, where erase_from is set", one_of=("erase_from", "concept")
    )
    rollouts: int = option(
        24,
        "whole rollouts in the bank; 0 keeps no bank and rolls out anew for every update",
        at_least=0,
    )
    reuse: int = option(8, "how often a point of the bank is used before the bank is built anew", at_least=1)
    staleness: int | None = option(
        None,
        "updates that points drawn by the student serve, with or without a bank, before it draws anew; null is 1 "
        f"without a bank and {STALENESS} with one",
        at_least=1,
    )
    max_batch: int = option(64, "most rows in one call of the denoiser while sampling", at_least=2)


@dataclass
class TrainingConfig:
    """The loop; see `esd.trainer`."""

    updates: int = option(150, "optimizer steps", at_least=1)
    batch_size: int = option(16, "points per forward pass and process", at_least=1)
    gradient_accumulation: int = option(1, "forward passes per update", at_least=1)
    lr: float = option(3e-5, "learning rate of Adam", above=0)
    lr_schedule: str = option("constant", "after the warm-up", one_of=("constant", "cosine", "linear"))
    warmup: int = option(0, "updates over which the learning rate rises from 0", at_least=0)
    betas: list[float] = option([0.9, 0.999], "of Adam", at_least=0, below=1)
    weight_decay: float = option(0.0, "per update, towards the base's weights (not towards 0), times lr", at_least=0)
    clip_norm: float = option(1.0, "largest gradient norm; 0 does not clip", at_least=0)
    optimizer: str = option(
        "adam", "adam8bit keeps Adam's moments in 8 bits (bitsandbytes)", one_of=("adam", "adam8bit")
    )
    gradient_checkpointing: bool = option(False, "less memory, a third more time")
    mixed_precision: str = option(
        "auto",
        "autocast; auto is bf16 over a bfloat16 base, fp16 over a float16 one",
        one_of=("auto", "no", "bf16", "fp16"),
    )
    compile: bool = option(False, "compiles the denoiser's repeated blocks: faster after minutes")
    channels_last: bool = option(False, "the memory layout that convolutions on cards like best; for UNets")
    processes: int | None = option(
        None, "processes that this run must have, started by accelerate launch; null is as launched", at_least=1
    )
    save_every: int = option(100, "updates between resumable states; 0 saves only when stopped", at_least=0)


@dataclass
class TrackerConfig:
    """Where metrics go besides run_dir/metrics.jsonl."""

    name: str = option("none", "where metrics also go", one_of=("none", "wandb", "tensorboard"))
    project: str = option("esd", "name of the project there")
    mode: str = option("offline", "of wandb", one_of=("offline", "online"))


@dataclass
class EvaluationConfig:
    """What is drawn and read after training."""

    target_images: int = option(
        200, "images of the erased concept that the judge reads; 0 skips the reading", at_least=0
    )
    retained_images: int = option(
        400, "images of everything else that the judge reads; 0 skips the reading", at_least=0
    )
    implied_images: int = option(
        60, 'images of the concept called by another word ("a kitty") that the judge reads', at_least=0
    )
    num_steps: int = option(20, "sampling steps of these images and the preview", at_least=1, at_most=1000)
    guidance_scale: float = option(4.0, "classifier-free guidance of these images and the preview", at_least=0)
    batch_size: int = option(32, "images per call", at_least=1)
    preview_images: int = option(6, "columns of preview.png", at_least=1, at_most=16)


def check_weights(weights: WeightsConfig) -> None:
    """Raises UserError for an adapter's setting without an adapter, or an adapter without a rank."""
    given = [name for name in ("rank", "alpha", "frozen") if getattr(weights, name) is not None]
    if weights.kind == "full" and given:
        raise UserError(
            f"weights.{given[0]}={getattr(weights, given[0])} says nothing about weights=full; set weights=lora, or "
            "leave it out"
        )
    if weights.kind == "lora" and weights.rank is None:
        raise UserError("weights.rank is not set; weights=lora sets 16, weights.rank=8 another one")


def check_precision(base: str, mixed: str, weights: WeightsConfig) -> None:
    """Raises UserError where float32 weights would stand in a narrower model without the autocast that fits it.

    Without float32 masters there is nothing to cast, and what would be said of a model that is float32 itself, or of
    an adapter, which is always float32, would be ignored. Float16 weights would overflow: their gradients cannot be
    scaled back.
    """
    if not weights.masters:
        if base != "bfloat16" or weights.kind == "lora" or mixed not in ("auto", "no"):
            raise UserError(
                f"weights.masters=false with model.precision={base}, weights={weights.kind} and training."
                f"mixed_precision={mixed}: allowed with bfloat16, full, and auto or no; or weights.masters=true"
            )
        return
    fits = {"bfloat16": ("auto", "bf16"), "float16": ("auto", "fp16")}.get(base)
    if fits and mixed not in fits:
        raise UserError(
            f"training.mixed_precision={mixed}: float32 weights in a {base} model need its autocast; allowed: "
            f"{', '.join(fits)}, or model.precision=float32"
        )


def check_pull(training: TrainingConfig) -> None:
    """Raises UserError where weight decay would carry the weights past the base, and further with every update."""
    share = training.lr * training.weight_decay
    if share > 1:
        raise UserError(
            f"training.weight_decay={training.weight_decay:g} times training.lr={training.lr:g} is {share:.3g}, more "
            f"than the whole way back to the base; allowed: up to 1, here training.weight_decay={1 / training.lr:g}"
        )


def check_time_rule(trajectory: TrajectoryConfig) -> None:
    """Raises UserError where a rule that relabels DDIM's times is asked of something else.

    With `scheduler` null it is the model's own, of which `esd.trajectory.times` knows.
    """
    relabels = trajectory.time_rule in ("compvis", "alt")
    if relabels and (trajectory.scheduler not in (None, "ddim") or trajectory.num_steps < 3):
        raise UserError(
            f"trajectory.time_rule={trajectory.time_rule} with trajectory.scheduler={trajectory.scheduler} and "
            f"trajectory.num_steps={trajectory.num_steps}: it relabels DDIM's times; use trajectory.scheduler=ddim and "
            "at least 3 steps, or trajectory.time_rule=visited"
        )


def check_staleness(trajectory: TrajectoryConfig) -> None:
    """Raises UserError where points that never grow stale are given a limit."""
    if trajectory.sampler == "teacher" and trajectory.staleness is not None:
        raise UserError(
            f"trajectory.staleness={trajectory.staleness} with trajectory.sampler=teacher: points of the frozen base "
            "never grow stale; set trajectory.sampler=student, or leave staleness out (trajectory.reuse says how often "
            "a bank's points are used)"
        )


def check_unused(trajectory: TrajectoryConfig, preserve: PreserveConfig) -> None:
    """Raises UserError where what was set is read by nothing; the defaults pass, and so does a reuse of once.

    Of `trajectory.negative` and a model without classifier-free guidance `esd.learner.point_sources` knows.
    """
    if trajectory.rollouts == 0 and trajectory.reuse not in (1, TrajectoryConfig.reuse):
        raise UserError(
            f"trajectory.reuse={trajectory.reuse} with trajectory.rollouts=0: without a bank no point is used again; "
            "set trajectory.reuse=1, or keep a bank with trajectory.rollouts=24"
        )
    if trajectory.negative is not None and trajectory.guidance_scale <= 1:
        raise UserError(
            f"trajectory.negative={trajectory.negative} with trajectory.guidance_scale={trajectory.guidance_scale:g}: "
            "without guidance no negative prompt is asked; leave it out, or set trajectory.guidance_scale=3"
        )
    if not preserve.prompts and preserve.weight != PreserveConfig.weight:
        raise UserError(
            f"preserve.weight={preserve.weight:g} without preserve.prompts weighs nothing; set preserve.prompts, such "
            "as preserve.prompts=['a {thing}'], or leave it out"
        )
