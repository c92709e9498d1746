"""What every trained stage of the recipe shares: its command line, and the loop it runs in.

The loop is seeded by step, averages the weights, saves often, and is resumed by the same command.

State is safetensors and JSON, published by renaming, so a stopped stage is never left half-written. A stage that has
no state may begin from published weights with a fresh optimiser.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from drawings import DATA
from pool import Pool
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def command_line(about: str | None, *, steps: int, batch: int, lr: float, seed: int) -> argparse.ArgumentParser:
    """Return the options that every trained stage has, with the stage's own defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=seed)
    return parser


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Pool]:
    """Read the command line, seed torch with it, and return it with the pool."""
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads for a few short captions would only get in torch's way
    torch.manual_seed(args.seed)
    return args, Pool.load(args.data / "pool.npz")


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained. `ema` is the decay of the averaged weights, which are what is published."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0
    save_every: int = 250


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate at a step: a linear warm-up, then a cosine to 2% of the peak."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Stage:
    """One model in training: its weights, their average, the optimiser, and where their state lives."""

    def __init__(self, name: str, model: torch.nn.Module, recipe: Recipe, folder: Path) -> None:
        self.name, self.model, self.recipe, self.folder = name, model, recipe, folder / name
        self.device = next(model.parameters()).device
        self.average = {k: v.detach().clone() for k, v in model.named_parameters()}
        decay = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        self.step = 0
        self._stopped = False

    def run(
        self, loss_of: Callable[[np.random.Generator], torch.Tensor], report: Callable[[], str] | None = None
    ) -> None:
        """Train until `recipe.steps`, or until SIGTERM, which saves and leaves with status 143.

        `loss_of` draws its own batch with the generator it is given, keyed by the step alone.
        """
        self._resume()
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stopped", True))
        total = sum(p.numel() for p in self.model.parameters())
        print(
            f"{self.name}: {total / 1e6:.2f} M parameters, steps {self.step}..{self.recipe.steps}, {self.recipe}",
            flush=True,
        )
        started, first, smooth = time.perf_counter(), self.step, None
        self.model.train()
        while self.step < self.recipe.steps:
            value = self._update(loss_of)
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            if self.step % 50 == 0 or self.step == self.recipe.steps:
                self._tell(smooth, (time.perf_counter() - started) / (self.step - first))
            if self._stopped or self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps:
                self._save()
                if report is not None and not self._stopped:
                    with self.averaged():
                        print(f"{self.name} {self.step}: {report()}", flush=True)
                    self.model.train()
            if self._stopped:
                sys.exit(143)

    def averaged(self) -> _Averaged:
        """Return a context in which the model holds its averaged weights."""
        return _Averaged(self)

    def _update(self, loss_of: Callable[[np.random.Generator], torch.Tensor]) -> float:
        """Take one step of the optimiser and of the average; return the loss."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        loss = loss_of(np.random.default_rng((self.recipe.seed, self.step)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_([self.average[name] for name in names], [p.detach() for p in parameters], 1 - decay)
        value = float(loss.detach())
        if not math.isfinite(value):
            sys.exit(f"{self.name}: the loss is {value} at step {self.step}; lower --lr and run the same command again")
        return value

    def _tell(self, loss: float, pace: float) -> None:
        print(
            f"{self.name} {self.step}/{self.recipe.steps} loss {loss:.4f}",
            f"{pace:.2f} s/step, {pace * (self.recipe.steps - self.step) / 60:.0f} min left",
            flush=True,
        )

    def _save(self) -> None:
        tensors = {f"weights.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slot.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "state.part"
        save_file(
            {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()},
            partial,
            {"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))},
        )
        os.replace(partial, self.folder / "state.safetensors")

    def _resume(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
        tensors = load_file(path, device=str(self.device))

        def part(name: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        self.model.load_state_dict(part("weights"))
        for name, value in part("average").items():
            self.average[name].copy_(value)
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in part("optimizer").items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
        self.step = int(metadata["step"])


class _Averaged:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __enter__(self) -> None:
        self.stage.model.eval()
        self.kept = {k: v.detach().clone() for k, v in self.stage.model.named_parameters()}
        self._put(self.stage.average)

    def __exit__(self, *_: object) -> None:
        self._put(self.kept)

    def _put(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.stage.model.named_parameters():
                parameter.copy_(values[name])
