"""What `python -m esd.train` takes."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from esd.config.common import MAX_SEED, ModelConfig, check_device
from esd.config.options import check_ranges, option
from esd.config.paths import expanded, slug
from esd.config.train_sections import (
    EvaluationConfig,
    ObjectiveConfig,
    PreserveConfig,
    TrackerConfig,
    TrainingConfig,
    TrajectoryConfig,
    WeightsConfig,
    check_precision,
    check_pull,
    check_staleness,
    check_time_rule,
    check_unused,
    check_weights,
)
from esd.errors import UserError

MAX_CONCEPT_CHARACTERS = 300  # a text encoder reads 77 tokens; more text than this cannot be seen by it


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
