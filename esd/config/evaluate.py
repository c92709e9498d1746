"""What `python -m esd.evaluate` takes: what `esd.generate` does, the suite, and who reads the images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esd.config.generate import GenerateConfig
from esd.config.options import fields_of, option
from esd.config.paths import slug
from esd.errors import UserError

ATTACKS = ("noise", "completion", "inpainting", "soft_prompt", "inversion")


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
    styles: list[str] = option([], "settings of esd.train for styles alone, after those; prompts may be among them")

    def summary(self) -> str:
        """The settings, for a person to read."""
        return ", ".join(self.training) + (f"; of styles also {', '.join(self.styles)}" if self.styles else "")


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

    def asked(self) -> dict[str, Any]:
        """The settings that may differ from those of a directory's earlier results, and decide what results say."""
        return {name: getattr(self, name) for name in ("limit", "judges", "thresholds", "denoiser_points")}

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
        fixed = {"experiment", "concepts", "erase_from", "run_dir", "model", "seed", "device", "evaluation"}
        fixed |= {"plan_only", "tracker"}
        given = {"training": (self.method.training, fixed | {"prompts"}), "styles": (self.method.styles, fixed)}
        for name, (settings, forbidden) in given.items():
            for setting in settings:
                if setting.lstrip("+~").partition("=")[0].partition(".")[0] in forbidden:
                    raise UserError(f"method.{name}: {setting!r} is the canvas' to set; leave it out")

    def check_no_canvas(self) -> None:
        """Raises UserError for a setting of the canvas without one."""
        given = {
            "method": self.method.name,
            "method.training": self.method.training,
            "method.styles": self.method.styles,
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

    def unused(self) -> set[str]:
        """Names of the settings that say nothing to the run asked for: of attacks that it does not run."""
        return {f"suite.settings.{name}" for name in ATTACKS if name not in self.suite.attacks}

    def run_path(self) -> Path:
        """The run directory: as given, or named after the prompts and the checkpoint, or the canvas' method."""
        if self.suite.name == "emoji_canvas":
            return Path(self.run_dir or Path("runs", f"canvas-{self.method.name}"))
        if self.suite.name == "attacks":
            return Path(self.run_dir or Path("runs", "attacks-" + slug(f"{self.prompts or ''} {self.checkpoint}")))
        if self.suite.name == "implicit":
            return Path(self.run_dir or Path("runs", "implicit-" + slug(str(self.checkpoint))))
        return Path(self.run_dir or Path("runs", "evaluate-" + slug(f"{self.prompts} {self.checkpoint or 'base'}")))
