"""What a user may set, what each setting means, and what it may be: the one place where input is checked.

A program's configuration is a tree of plain dataclasses. Every field carries its own help and its own
range, so the same declaration types the YAML (Hydra reads these classes as schemas), prints `--help` and
refuses a bad value before any model is loaded. Nothing here imports torch or Hydra, so `--help` costs no
start-up time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esd.errors import UserError

MAX_SEED = 2**63 - 1  # torch's generators take no more
SOLVERS = ("ddim", "euler", "heun", "dpm++", "unipc", "lms")  # schedulers that add no noise, from any first time on
SCHEDULERS = ("ddim", "ddpm", "dpm++", "euler", "euler_a", "heun", "lms", "pndm", "unipc")
ANALYSES = ("layers", "attention", "walkthrough", "representations", "erasure")
ATTACKS = ("noise", "completion", "inpainting", "soft_prompt", "inversion")
STALENESS = 8  # updates that a bank filled by the student serves unless told otherwise
MAX_CONCEPT_CHARACTERS = 300  # a text encoder reads 77 tokens; more text than this cannot be seen by it


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that knows what it means and which values it may take.

    Numbers must be finite besides keeping their bounds; a list applies the rule to each of its elements.
    """
    rule = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"help": help, "rule": {k: v for k, v in rule.items() if v is not None}, "one_of": one_of}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The base."""

    path: str = option("checkpoints/emoji-sd", "a diffusers folder, or a name on the Hugging Face hub")
    revision: str | None = option(None, "commit of a hub model; pin one to know what you erased from")
    precision: str = option(
        "float32",
        "of the frozen weights; the trained ones are float32, unless weights.masters=false",
        one_of=("float32", "bfloat16", "float16"),
    )


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
    """What must stay; see `esd.trainer`."""

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


@dataclass
class TrainConfig:
    """Everything `python -m esd.train` takes."""

    concepts: list[str] = option([], "what to erase, for example concepts=[cat]")
    prompts: list[str] = option(["{}"], "training prompts; {} is the concept, {thing} and {style} all the model knows")
    erase_from: list[str] = option(
        [], "erase only as an attribute of these, one per concept (hat from cowboy); templates wrap both"
    )
    selection: str = option(
        "esd_x",
        "what to train: esd_x, esd_x_strict, esd_u, esd_x_2023, esd_u_2023, esd_all, esd_all_2023, self_attention, "
        "or an expression such as 'cross.k + up.self'",
    )
    run_dir: str | None = option(None, "where results go; null is runs/<concept>")
    seed: int = option(0, "of every random draw", at_least=0, at_most=MAX_SEED)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    device_memory: float | None = option(
        None, "GB of the card that the plan has to fit, such as 24; null takes the card's own", above=0
    )
    plan_only: bool = option(False, "say what would be trained and what memory it takes, and stop")
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preserve: PreserveConfig = field(default_factory=PreserveConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def check(self) -> None:
        """Raises UserError for the first value that is out of its range; touches no file and no model."""
        check_ranges(self)
        check_device(self.device)
        self.objective.anchor = self.objective.anchor or "null"  # `anchor: null` in YAML means the same
        self.model.path, self.run_dir = expanded(self.model.path), expanded(self.run_dir)
        self.concepts = check_concepts(self.concepts)
        if self.erase_from:
            self.erase_from = check_concepts(self.erase_from, name="erase_from")
            if len(self.erase_from) != len(self.concepts):
                raise UserError(
                    f"erase_from={self.erase_from} names {len(self.erase_from)} for {len(self.concepts)} "
                    "concepts; give one for each, or none"
                )
            self.objective.anchor = "erase_from"  # whatever an experiment has for others; the plan tells it
        elif self.objective.anchor == "erase_from":
            raise UserError(
                "objective.anchor=erase_from needs erase_from, such as erase_from=[cowboy]; or null, concept"
            )
        if not self.prompts:
            raise UserError("prompts=[] trains on nothing; allowed: at least one template, such as prompts=['{}']")
        for template in self.prompts:
            if "{}" not in template:
                raise UserError(
                    f"prompts={self.prompts}: {template!r} never names the concept; put {{}} where it belongs"
                )
        check_slots("prompts", self.prompts, ("{}", "{thing}", "{style}"))
        check_slots("preserve.prompts", self.preserve.prompts, ("{thing}", "{style}"))
        check_precision(self.model.precision, self.training.mixed_precision, self.weights)
        if self.training.optimizer == "adam8bit" and not importlib.util.find_spec("bitsandbytes"):
            raise UserError(
                "training.optimizer=adam8bit needs bitsandbytes, which is not installed; install the extra 8bit, as in "
                "pip install 'esd-diffusion[8bit]', or set training.optimizer=adam"
            )
        if len(self.training.betas) != 2:
            raise UserError(f"training.betas={self.training.betas}: Adam takes two, such as training.betas=[0.9,0.999]")
        check_weights(self.weights)
        check_pull(self.training)
        if self.training.warmup >= self.training.updates:
            raise UserError(
                f"training.warmup={self.training.warmup} with training.updates={self.training.updates}: the learning "
                f"rate would never be reached; allowed: 0 to {self.training.updates - 1}"
            )
        check_time_rule(self.trajectory)
        check_staleness(self.trajectory)
        check_unused(self.trajectory, self.preserve)

    def run_path(self) -> Path:
        """The run directory: as given, or named after the concepts."""
        return Path(self.run_dir or Path("runs", slug(", ".join(self.concepts))))


@dataclass
class GenerateConfig:
    """Everything `python -m esd.generate` takes."""

    prompts: Any = option(
        None,
        "a .csv or .jsonl file, a list such as '[a cat, a dog]', or a set known by its hash, esd_vangogh:PATH; "
        "{thing} and {style} run over all the model knows",
    )
    checkpoint: str | None = option(None, "erased.safetensors or a run directory; null draws the base alone")
    run_dir: str | None = option(None, "where images go; null is runs/images-<prompts>")
    images_per_prompt: int = option(1, "each with its own seed", at_least=1)
    num_steps: int = option(20, "sampling steps", at_least=1, at_most=1000)
    guidance_scale: float = option(4.0, "classifier-free guidance, where a prompt's row sets none", at_least=0)
    batch_size: int = option(16, "images per call; changes no image", at_least=1)
    base_images: str | None = option(
        None, "a folder in which the base's images are kept and found again, whatever the run; null keeps none"
    )
    interventions: list[str] = option(
        [], "what is done to base and erased model while they draw, such as 'Skip(up[0].cross, steps=(0, 5))'"
    )
    seed: int = option(0, "of the first image, where a prompt's row sets none", at_least=0, at_most=MAX_SEED)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    plan_only: bool = option(False, "say what would be drawn, and stop")
    model: ModelConfig = field(default_factory=ModelConfig)

    def check(self) -> None:
        """Raises UserError for the first value that is out of its range; touches no file and no model."""
        self.check_drawing()
        self.prompts = check_prompts(self.prompts)

    def check_drawing(self) -> None:
        """As `check`, of all but the prompts."""
        check_ranges(self)
        check_device(self.device)
        self.model.path, self.run_dir = expanded(self.model.path), expanded(self.run_dir)
        self.base_images = expanded(self.base_images)

    def run_path(self) -> Path:
        """The run directory: as given, or named after the prompts."""
        return Path(self.run_dir or Path("runs", "images-" + slug(str(self.prompts))))


@dataclass
class BudgetConfig:
    """The most that one attack may spend on one model; see `esd.evaluation.attacks.budget`."""

    gradients: int | None = option(None, "rows that a backward pass goes back through", at_least=1)
    queries: int | None = option(None, "rows that the denoiser evaluates", at_least=1)
    seconds: float | None = option(None, "of wall-clock time", above=0)


@dataclass
class SuiteConfig:
    """What is measured."""

    name: str = option(
        "prompts",
        "what is measured: prompts reads a checkpoint on prompts, implicit on other ways to ask for what it erased, "
        "emoji_canvas erases in turn all that it reads on, attacks brings back what a checkpoint erased",
        one_of=("prompts", "implicit", "emoji_canvas", "attacks"),
    )
    things: list[str] = option([], "of the canvas; [] is all that the model knows")
    styles: list[str] = option([], "of the canvas; [] is all that the model knows")
    attacks: list[str] = option([], f"run one after the other: {', '.join(ATTACKS)}")
    settings: Any = option(None, "of attacks, such as suite.settings.soft_prompt.tokens=4")
    concept: str | None = option(None, "that attacks are to bring back; null is what the checkpoint erased")
    budget: BudgetConfig = field(default_factory=BudgetConfig)


@dataclass
class MethodConfig:
    """How the canvas erases."""

    name: str | None = option(None, "of the method, for the table")
    training: list[str] = option([], "settings of esd.train, after those of experiment=erase_thing or erase_style")


@dataclass
class EvaluateConfig(GenerateConfig):
    """Everything `python -m esd.evaluate` takes: what `esd.generate` does, and who reads the images."""

    run_dir: str | None = option(None, "where results go; null is runs/evaluate-<prompts and checkpoint>")
    base_images: str | None = option(
        "runs/.base-images",
        "a folder in which the base's images are kept and found again, whatever the run; null keeps none",
    )
    limit: int | None = option(
        None,
        "at most so many prompts, or erasures of the canvas, evenly spaced over all; null takes all, 16 prompts where "
        "attacks find their own, and 40 for each way to ask of suite=implicit",
        at_least=1,
    )
    judges: list[str] = option(
        [],
        "who reads the images: emoji-judge, emoji-halves, emoji-clip, clip:NAME, resnet50, nudenet, nsfw:NAME, ssim, "
        "lpips; [] takes the model's own",
    )
    thresholds: Any = option(None, "of judges, in place of their own: thresholds={nudenet: 0.6}")
    denoiser_points: int = option(
        10, "times t at which the denoiser itself is compared with the base's; 0 skips it", at_least=0
    )
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    method: MethodConfig = field(default_factory=MethodConfig)

    def check(self) -> None:
        """Raises UserError for the first value that is out of its range; touches no file and no model."""
        suite = self.suite.name
        if suite == "prompts" or (suite == "attacks" and self.prompts is not None):
            super().check()
        else:
            self.check_drawing()
        self.check_canvas() if suite == "emoji_canvas" else self.check_no_canvas()
        self.check_attacks() if suite == "attacks" else self.check_no_attacks()
        self.check_implicit() if suite == "implicit" else None
        if not isinstance(self.thresholds or {}, dict):
            raise UserError(f"thresholds={self.thresholds}; allowed: judges with numbers, thresholds={{nudenet: 0.6}}")
        for name, threshold in (self.thresholds or {}).items():
            number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
            if not number or not 0 <= threshold <= 1:
                raise UserError(f"thresholds: {name}={threshold}; allowed: a number from 0 to 1, such as 0.5")

    def check_canvas(self) -> None:
        """Raises UserError where the canvas gets no method, or what it makes itself."""
        own: dict[str, Any] = dict.fromkeys(("prompts", "checkpoint", "thresholds"))
        own |= {"judges": [], "interventions": []}
        for name, value in own.items():
            if (given := getattr(self, name)) != value:
                raise UserError(
                    f"{name}={given} says nothing to suite=emoji_canvas, which makes its own prompts and checkpoints "
                    "and asks the model's own judge; leave it out"
                )
        if not self.method.name:
            raise UserError("suite=emoji_canvas needs a method to erase by, such as method=esd_u or method=esd_x")
        fixed = {"experiment", "concepts", "erase_from", "prompts", "run_dir", "model", "seed", "device", "evaluation"}
        fixed |= {"plan_only", "tracker"}
        for setting in self.method.training:
            if setting.lstrip("+~").partition("=")[0].partition(".")[0] in fixed:
                raise UserError(f"method.training: {setting!r} is the canvas' to set; leave it out")

    def check_no_canvas(self) -> None:
        """Raises UserError for a setting of the canvas without one."""
        given = {
            "method": self.method.name,
            "method.training": self.method.training,
            "suite.things": self.suite.things,
            "suite.styles": self.suite.styles,
        }
        for name, value in given.items():
            if value:
                raise UserError(f"{name}={value} says nothing to suite={self.suite.name}; set suite=emoji_canvas")

    def check_implicit(self) -> None:
        """Raises UserError where there is nothing erased to ask for, or what the suite finds itself is given."""
        if not self.checkpoint:
            raise UserError("checkpoint=null: nothing to ask for; give an erased.safetensors or a run directory")
        for name, value in {"prompts": self.prompts, "judges": self.judges}.items():
            if value:
                raise UserError(
                    f"{name}={value} says nothing to suite=implicit, which makes its own prompts and asks the model's "
                    "own judge; leave it out, or set suite=prompts"
                )

    def check_attacks(self) -> None:
        """Raises UserError for what attacks cannot do without, or have no use for."""
        if not self.checkpoint:
            raise UserError("checkpoint=null: nothing to attack; give an erased.safetensors or a run directory")
        unused: dict[str, Any] = {
            "images_per_prompt": 1,
            "denoiser_points": 0,
            "base_images": None,
            "interventions": [],
        }
        for name, none in unused.items():
            if (told := getattr(self, name)) != none:
                raise UserError(f"{name}={told} says nothing to suite=attacks; leave it out")
        chosen, given = self.suite.attacks, self.suite.settings or {}
        if not chosen or len(set(chosen) & set(ATTACKS)) < len(chosen):
            raise UserError(f"suite.attacks={chosen}; allowed: one or more of {', '.join(ATTACKS)}, each once")
        for name in given if isinstance(given, dict) else [given]:
            if name not in ATTACKS or not isinstance(given[name] or {}, dict):
                raise UserError(
                    f"suite.settings: {name!r}; allowed: settings of {', '.join(ATTACKS)}, such as "
                    "suite.settings.soft_prompt.tokens=4"
                )

    def check_no_attacks(self) -> None:
        """Raises UserError for a setting of attacks without any."""
        for name, value, _ in fields_of(self.suite, "suite."):
            if value and name.split(".")[1] in ("attacks", "settings", "concept", "budget"):
                raise UserError(f"{name}={value} says nothing to suite={self.suite.name}; set suite=attacks")

    def run_path(self) -> Path:
        """The run directory: as given, or named after the prompts and the checkpoint, or the canvas' method."""
        if self.suite.name == "emoji_canvas":
            return Path(self.run_dir or Path("runs", f"canvas-{self.method.name}"))
        if self.suite.name == "attacks":
            return Path(self.run_dir or Path("runs", "attacks-" + slug(f"{self.prompts or ''} {self.checkpoint}")))
        if self.suite.name == "implicit":
            return Path(self.run_dir or Path("runs", "implicit-" + slug(str(self.checkpoint))))
        return Path(self.run_dir or Path("runs", "evaluate-" + slug(f"{self.prompts} {self.checkpoint or 'base'}")))


@dataclass
class AnalysisConfig:
    """What is looked at."""

    name: str = option("layers", "what is looked at; its own settings are those under its name", one_of=ANALYSES)


class AnalysisSettings:
    """What the settings of every analysis share."""

    def check(self) -> None:
        """Raises UserError for values that do not fit each other."""


@dataclass
class LayersConfig(AnalysisSettings):
    """Settings of analysis=layers; see `esd.analysis.layers`."""

    prompts: list[str] = option(
        [
            "a cat in the mosaic style",
            "a house in the watercolor style",
            "a rose in the neon style",
            "a guitar in the flat style",
        ],
        "drawn with layers left out, or with layers that read another prompt or seed",
    )
    other_things: list[str] = option(
        [
            "a house in the mosaic style",
            "a cat in the watercolor style",
            "a guitar in the neon style",
            "a rose in the flat style",
        ],
        "for each of the prompts one that asks for another thing, otherwise alike",
    )
    other_styles: list[str] = option(
        [
            "a cat in the watercolor style",
            "a house in the mosaic style",
            "a rose in the flat style",
            "a guitar in the neon style",
        ],
        "for each of the prompts one that asks for another style, otherwise alike",
    )
    pictures: int = option(4, "of each prompt, where one layer is left out; each with its own seed", at_least=1)
    window_pictures: int = option(1, "of each prompt, under every other edit; at most layers.pictures", at_least=1)
    lengths: list[int] = option([], "of windows of consecutive layers; [] is every length", at_least=1)
    weights: list[float] = option([1.0, 5.0, 10.0], "w, of what layers make of the text", at_least=0)

    def check(self) -> None:
        """Raises UserError for prompts without counterpart, or for more pictures of windows than there are."""
        for name in ("other_things", "other_styles"):
            told = getattr(self, name)
            if len(told) != len(self.prompts):
                raise UserError(
                    f"layers.{name} has {len(told)} for {len(self.prompts)} layers.prompts; give one for each"
                )
        if len(set(self.prompts)) < len(self.prompts):
            raise UserError(f"layers.prompts={self.prompts} names a prompt twice; allowed: each once")
        if self.window_pictures > self.pictures:
            raise UserError(
                f"layers.window_pictures={self.window_pictures}: allowed: at most layers.pictures={self.pictures}"
            )


@dataclass
class AttentionConfig(AnalysisSettings):
    """Settings of analysis=attention; see `esd.analysis.attention`."""

    prompts: list[str] = option(
        ["a cat and a rose", "a guitar and a pizza"], "what pictures are edited from; two things for a judge of scenes"
    )
    replaced: list[str] = option(
        ["a dog and a rose", "a guitar and a cake"],
        "for each of the prompts one of as many words, some of them others",
    )
    refined: list[str] = option(
        ["a cat and a rose in the mosaic style", "a guitar and a pizza in the neon style"],
        "for each of the prompts one that says more",
    )
    pictures: int = option(8, "of each prompt, each with its own seed", at_least=1)
    where: str | None = option(None, "attentions whose maps are shown and edited; null is all that read the text")
    resolution: int | None = option(8, "edge of the maps shown, in image tokens; null is the largest", at_least=1)
    cross_replace: float = option(
        0.8, "share of the steps, from the first, in which attention to the text is replaced", above=0, at_most=1
    )
    self_replace: float = option(0.4, "the same for attention of the image to itself", above=0, at_most=1)
    threshold: float = option(0.3, "of local blend's mask, in shares of the largest attention", at_least=0, at_most=1)
    shares: list[float] = option(
        [0.2, 0.4, 0.6, 0.8, 1.0], "of the steps, and of the layers, that are replaced in a sweep", above=0, at_most=1
    )
    weights: list[float] = option([0.0, 0.5, 2.0, 4.0], "of the words that are replaced elsewhere", at_least=0)

    def check(self) -> None:
        """Raises UserError for prompts without counterpart, or of which nothing, or not word for word, differs."""
        for name in ("replaced", "refined"):
            if len(told := getattr(self, name)) != len(self.prompts):
                raise UserError(
                    f"attention.{name} has {len(told)} for {len(self.prompts)} attention.prompts; give one for each"
                )
        if len(set(self.prompts)) < len(self.prompts):
            raise UserError(f"attention.prompts={self.prompts} names a prompt twice; allowed: each once")
        for prompt, other in zip(self.prompts, self.replaced, strict=True):
            one, two = prompt.split(), other.split()
            if len(one) != len(two) or one == two:
                raise UserError(
                    f"attention.replaced: {other!r} for {prompt!r}; allowed: as many words, of which some differ"
                )


@dataclass
class WalkthroughConfig(AnalysisSettings):
    """Settings of analysis=walkthrough; see `esd.analysis.walkthrough`."""

    prompt: str = option("a cat in the mosaic style", "what is drawn")
    other: str = option("a dog in the watercolor style", "what pictures go on under, and what the prompt is mixed with")
    words: list[str] = option(
        ["cat", "dog"], "of the prompt the word that gets the second one's embedding, and then that of a new word"
    )
    pictures: int = option(3, "of everything, each with its own seed", at_least=1)
    samplers: list[str] = option(
        ["ddim", "euler", "heun", "dpm++", "unipc"], f"compared as solvers of one equation: {', '.join(SOLVERS)}"
    )
    sampler_steps: list[int] = option([5, 10, 20, 40, 80], "steps of each sampler", at_least=2, at_most=1000)
    starts: list[float] = option(
        [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "shares of the steps that a picture skips", at_least=0, below=1
    )
    shares: list[float] = option(
        [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0], "of the prompt in a mixture", at_least=0, at_most=1
    )
    scales: list[float] = option([0.0, 1.0, 2.0, 4.0, 8.0, 16.0], "of guidance; 0 is the null prompt's", at_least=0)
    blue: list[float] = option([0.0, 25.0, 50.0, 75.0, 100.0], "scales of guidance towards blue", at_least=0)
    drawings: list[str] = option(
        [], "files of pictures that the prompt describes, to learn a new word from; [] has the base draw it"
    )
    elsewhere: list[str] = option(
        ["a cat in the watercolor style", "a cat in the neon style", "a cat in the flat style"],
        "prompts in which the new word is then tried",
    )
    updates: int = option(105, "of the new word's embedding", at_least=1)
    lr: float = option(0.01, "learning rate of the new word's embedding", above=0)

    def check(self) -> None:
        """Raises UserError for words that the prompts do not hold, or a sampler of another kind."""
        if len(self.words) != 2:
            raise UserError(f"walkthrough.words={self.words}: allowed: two words, such as [cat, dog]")
        for name, prompt in (("prompt", self.prompt), *(("elsewhere", prompt) for prompt in self.elsewhere)):
            if self.words[0].lower() not in prompt.lower().split():
                raise UserError(f"walkthrough.{name}={prompt!r} does not hold {self.words[0]!r}, the first of words")
        for sampler in self.samplers:
            if sampler not in SOLVERS:
                raise UserError(f"walkthrough.samplers: {sampler!r}; allowed: {', '.join(SOLVERS)}")


@dataclass
class RepresentationsConfig(AnalysisSettings):
    """Settings of analysis=representations; see `esd.analysis.representations`."""

    prompts: list[str] = option(
        [
            "a cat in the flat style", "a cat in the watercolor style", "a dog in the flat style",
            "a rose in the flat style", "a bus in the neon style",
        ],
        "one picture each, which the model is then shown",
    )  # fmt: skip
    positions: list[str] = option(
        ["mid_block", "up_blocks[1]"], "where representations are taken: modules by path, or selections such as up[1]"
    )
    noises: int = option(100, "that the spread is taken over", at_least=2)
    channel_steps: list[int] = option(
        list(range(0, 501, 50)), "training times at which channels are measured", at_least=0
    )
    histogram_step: int = option(100, "training time of the histogram of channels", at_least=0)
    map_step: int = option(50, "training time of the maps of spread and likeness", at_least=0)
    spread_steps: list[int] = option(
        list(range(0, 251, 50)), "training times at which the mean spread is measured", at_least=0
    )


@dataclass
class ErasureConfig(AnalysisSettings):
    """Settings of analysis=erasure; see `esd.analysis.erasure`."""

    target: list[str] = option([], "prompts that ask for what was erased; [] takes those of the model's vocabulary")
    retained: list[str] = option([], "prompts that should be left alone; [] takes those of the model's vocabulary")
    pictures: int = option(6, "of target and of retained prompts, in every place and step that is tried", at_least=1)
    windows: int = option(5, "into which the sampling steps are cut", at_least=1)
    inputs: int = option(
        40, "of each probe that are of the concept; as many others, half of all for the test", at_least=4
    )


@dataclass
class AnalyzeConfig:
    """Everything `python -m esd.analyze` takes."""

    checkpoint: str | None = option(
        None, "erased.safetensors or a run directory, looked at beside the base; null is the base alone"
    )
    run_dir: str | None = option(None, "where results go; null is runs/<analysis and checkpoint>")
    num_steps: int = option(10, "sampling steps", at_least=1, at_most=1000)
    guidance_scale: float = option(4.0, "classifier-free guidance", at_least=0)
    batch_size: int = option(16, "most pictures in one batch", at_least=1)
    seed: int = option(0, "of the first picture; those after it count up", at_least=0, at_most=MAX_SEED)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    plan_only: bool = option(False, "say what would be looked at, and stop")
    model: ModelConfig = field(default_factory=ModelConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    layers: LayersConfig = field(default_factory=LayersConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    walkthrough: WalkthroughConfig = field(default_factory=WalkthroughConfig)
    representations: RepresentationsConfig = field(default_factory=RepresentationsConfig)
    erasure: ErasureConfig = field(default_factory=ErasureConfig)

    @property
    def settings(self) -> Any:
        """Those of the analysis asked for."""
        return getattr(self, self.analysis.name)

    def check(self) -> None:
        """Raises UserError for the first value that is out of its range; touches no file and no model."""
        check_ranges(self)
        check_device(self.device)
        self.model.path, self.run_dir = expanded(self.model.path), expanded(self.run_dir)
        self.checkpoint = expanded(self.checkpoint)
        own = self.analysis.name
        defaults = {name: value for name, value, _ in fields_of(AnalyzeConfig())}
        for analysis in ANALYSES:
            for name, value, _ in fields_of(getattr(self, analysis), f"{analysis}."):
                if analysis != own and value != defaults[name]:
                    raise UserError(f"{name}={value} says nothing to analysis={own}; set analysis={analysis}")
                if analysis == own and value == [] != defaults[name]:
                    raise UserError(f"{name}=[] leaves nothing to look at; allowed: such as {name}={defaults[name]}")
        self.settings.check()

    def run_path(self) -> Path:
        """The run directory: as given, or named after the analysis and the checkpoint."""
        return Path(self.run_dir or Path("runs", f"{self.analysis.name}-{slug(self.checkpoint or self.model.path)}"))


def check_prompts(prompts: Any) -> str | list[Any]:
    """The prompts of a program that draws, a leading ~ of a path replaced; raises UserError for none."""
    if not prompts or not isinstance(prompts, str | list):
        raise UserError(
            f"prompts={prompts!r}: nothing to draw; allowed: a .csv or .jsonl file, a set such as i2p:PATH, or a "
            "list such as prompts='[a cat, a dog]'"
        )
    return expanded(prompts) if isinstance(prompts, str) else prompts


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


def check_ranges(config: Any) -> None:
    """Raises UserError for the first field below `config` whose value breaks its own rule."""
    for name, value, spec in fields_of(config):
        one_of, rule = spec.metadata.get("one_of"), spec.metadata.get("rule", {})
        if one_of and value is not None and value not in one_of:
            example = spec.default or "null"
            raise UserError(f"{name}={value}: allowed: {', '.join(one_of)}; for example {name}={example}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool) and not _keeps(number, rule):
                words = " and ".join(f"{word} {bound:g}" for word, bound in rule.items()) or "any size"
                example = "null" if spec.default is None else spec.default
                mend = "" if isinstance(value, list) else f"; for example {name}={example}"
                raise UserError(f"{name}={value}: allowed: a finite number, {words}{mend}")


def _keeps(number: float, rule: dict[str, float]) -> bool:
    """Whether a number is finite and inside its bounds."""
    tests = {
        "at least": number >= rule.get("at least", number),
        "above": number > rule.get("above", -math.inf),
        "at most": number <= rule.get("at most", number),
        "below": number < rule.get("below", math.inf),
    }
    return math.isfinite(number) and all(tests.values())


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted name, value, field) of every leaf, in the order of declaration."""
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{spec.name}.")
        else:
            yield prefix + spec.name, value, spec


def check_concepts(concepts: Sequence[str], *, name: str = "concepts") -> list[str]:
    """The concepts with single spaces and no leading article, which templates add: "a cat" would become "an a cat".

    A slash, a quote or an emoji is fine: file names are made by `slug`, never from the concept itself.

    Raises:
        UserError: a concept is nothing a text encoder could read: empty, too long, several lines.
    """
    if not concepts:
        raise UserError(f"{name}=[] names nothing to erase; allowed: one concept or more, such as {name}=[cat]")
    for concept in concepts:
        if not isinstance(concept, str):
            raise UserError(f"{name}: {concept!r} is a list in a list; allowed: text, such as {name}=[cat,dog]")
        if not concept.strip():
            raise UserError(f"{name}: {concept!r} is empty; allowed: a word or a phrase, such as {name}=[cat]")
        if len(concept) > MAX_CONCEPT_CHARACTERS:
            raise UserError(
                f"{name}: {concept[:20]!r}... has {len(concept)} characters; allowed: at most "
                f"{MAX_CONCEPT_CHARACTERS}, a text encoder reads no more; name the concept in a phrase"
            )
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in concept):
            raise UserError(
                f"{name}: {concept!r} holds a line break or a control character; allowed: one line of text; "
                "give several concepts as a list, such as concepts=[cat,dog]"
            )
        if "{" in concept or "}" in concept:
            raise UserError(f"{name}: {concept!r} holds a brace, which templates use; allowed: text without {{ and }}")
    spaced = [" ".join(concept.split()) for concept in concepts]
    plain = [re.sub(r"^(a|an|the) (?=\S)", "", concept, flags=re.IGNORECASE) for concept in spaced]
    if len({concept.casefold() for concept in plain}) < len(plain) and name == "concepts":
        raise UserError(f"{name}={list(concepts)} names a concept twice; allowed: each once")
    return plain


def check_slots(name: str, templates: Sequence[str], slots: Sequence[str]) -> None:
    """Raises UserError for braces that are none of these slots: they would be trained on as they stand."""
    for template in templates:
        rest = template
        for slot in slots:
            rest = rest.replace(slot, "")
        if "{" in rest or "}" in rest:
            raise UserError(f"{name}: {template!r} holds braces that nothing fills; allowed: {', '.join(slots)}")


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

    Of `trajectory.negative` and a model without classifier-free guidance `esd.trainer.point_sources` knows.
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


def check_device(device: str) -> None:
    """Raises UserError for what is no name of a device; whether the machine has it, torch says later."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"device={device}: allowed: auto, cpu, mps, cuda, or one card such as cuda:1")


def expanded(path: Any) -> Any:
    """A path with a leading ~ replaced by the home directory; None stays None."""
    return os.path.expanduser(path) if path else path


def slug(text: str) -> str:
    """A file name for any text: plain letters and digits for the eye, 8 hex digits of a hash."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return f"{plain or 'concept'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def conf_dir() -> Path:
    """The folder of YAML files: inside the package in a wheel, beside it in a clone.

    Raises:
        UserError: neither exists, so the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no conf/ in {package} or beside it: this installation of esd is incomplete; install it again")
