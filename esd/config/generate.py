"""What `python -m esd.generate` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esd.config.common import MAX_SEED, ModelConfig, check_device
from esd.config.options import check_ranges, option
from esd.config.paths import expanded, slug
from esd.errors import UserError


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


def check_prompts(prompts: Any) -> str | list[Any]:
    """The prompts of a program that draws, a leading ~ of a path replaced; raises UserError for none."""
    if not prompts or not isinstance(prompts, str | list):
        raise UserError(
            f"prompts={prompts!r}: nothing to draw; allowed: a .csv or .jsonl file, a set such as i2p:PATH, or a "
            "list such as prompts='[a cat, a dog]'"
        )
    return expanded(prompts) if isinstance(prompts, str) else prompts
