"""What `python -m esd.analyze` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esd.config.analyses import (
    AttentionConfig,
    ErasureConfig,
    LayersConfig,
    RepresentationsConfig,
    WalkthroughConfig,
)
from esd.config.common import MAX_SEED, ModelConfig, check_device
from esd.config.options import check_ranges, fields_of, option
from esd.config.paths import expanded, slug
from esd.errors import UserError

ANALYSES = ("layers", "attention", "walkthrough", "representations", "erasure")


@dataclass
class AnalysisConfig:
    """What is looked at."""

    name: str = option("layers", "what is looked at; its own settings are those under its name", one_of=ANALYSES)


@dataclass
class AnalyzeConfig:
    """Everything `python -m esd.analyze` takes."""

    checkpoint: str | None = option(
        None, "erased.safetensors or a run directory, looked at beside the base; null is the base alone"
    )
    run_dir: str | None = option(None, "where results go; null is runs/<analysis and checkpoint>")
    num_steps: int = option(6, "sampling steps", at_least=1, at_most=1000)
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

    def unused(self) -> set[str]:
        """Names of the settings that say nothing to the analysis asked for: the other analyses' own."""
        return {name for name in ANALYSES if name != self.analysis.name}

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
        self.settings.check()

    def run_path(self) -> Path:
        """The run directory: as given, or named after the analysis and the checkpoint."""
        return Path(self.run_dir or Path("runs", f"{self.analysis.name}-{slug(self.checkpoint or self.model.path)}"))
