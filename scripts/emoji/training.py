"""What every trained stage of the recipe shares: its command line, and the loop it runs in.

The loop is seeded by step, averages the weights, saves often, and is resumed by the same command.

State is safetensors and JSON, published by renaming, so a stopped stage is never left half-written. It remembers every
run that led to it, and what it was trained on: going on with another recipe or on other data has to be asked for. A
stage that has no state may begin from published weights with a fresh optimiser. The runs that made a part are told in
its folder, so what is published tells of its own making whatever was trained since.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from drawings import DATA
from files import Refused, arguments, folder_digest, need, there, whole, whole_folders
from pool import Pool
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAY_CHANGE = {"steps", "lr", "save_every", "report_every"}
"""What a resumed stage may be asked for anew: how long, how fast, how often it is saved. The rest is the recipe."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PUBLISHED = {
    "vae": "vae",
    "unet": "unet",
    "text": "text_encoder",
    "tokenizer": "tokenizer",
    "clip": "../emoji-clip",
    "judge": "../emoji-judge",
}
"""Folder of the data -> where the published pipeline has it; emoji-clip and emoji-judge lie beside the pipeline."""
HISTORY = "training.json"
"""In the folder of a part or of a published pipeline: the runs of every stage that made it."""
Runs = dict[str, list[dict[str, Any]]]
"""Stage -> what its runs were."""


def command_line(about: str | None, *, steps: int | None, batch: int, lr: float, seed: int) -> argparse.ArgumentParser:
    """Return the options that every trained stage has, with the stage's own defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--start", type=Path, help="a published pipeline to begin from, with a fresh optimiser")
    parser.add_argument("--changed", action="store_true", help="go on although recipe or data changed since the state")
    return parser


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Pool]:
    """Read the command line, seed torch with it, and return it with the pool."""
    args = arguments(parser)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads for a few short captions would only get in torch's way
    torch.manual_seed(args.seed)
    return args, Pool.load(args.data / "pool.npz")


def adopt(args: argparse.Namespace, stage: str, begins: Collection[str], parts: Collection[str] = ()) -> None:
    """With --start, copy the `parts` that a stage stands on from the published folders, where the data lacks them.

    What the stage itself `begins` from must be published too. Refuses --start where the stage has a state: the state
    would win, and the published weights be ignored.
    """
    if args.start is None:
        return
    state = args.data / "state" / stage / "state.safetensors"
    if state.exists():
        raise Refused(
            f"--start {args.start} would be ignored: {state} exists; remove it to begin from {args.start}, "
            "or leave --start out to go on from it"
        )
    missing = [name for name in (*begins, *parts) if not (args.start / PUBLISHED[name]).is_dir()]
    if missing:
        raise Refused(
            f"--start {args.start} lacks {', '.join(PUBLISHED[name] for name in missing)}; "
            "name a published pipeline, such as checkpoints/emoji-sd"
        )
    had = [name for name in parts if there(args.data / name)]
    for name in had:
        if name != "judge" and folder_digest(args.data / name) != folder_digest(args.start / PUBLISHED[name]):
            raise Refused(
                f"{args.data / name} is not the {name} that {args.start} was trained with; remove it to use that of "
                f"{args.start}, or leave --start out"
            )
    with whole_folders(args.data / f"part.{stage}", args.data) as new:
        for name in set(parts) - set(had):
            shutil.copytree(args.start / PUBLISHED[name], new / name)
            if runs := history(args.start, name):
                tell(new / name, {name: runs})


def history(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Return a stage's runs as they are told beside what they made; none where nothing is told."""
    told = folder / HISTORY
    return json.loads(told.read_text()).get(stage, []) if told.exists() else []


def tell(folder: Path, runs: Runs) -> None:
    """Write beside a part the runs that made it."""
    (folder / HISTORY).write_text(json.dumps(runs, indent=1) + "\n")


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
    report_every: int = 250


@dataclass(frozen=True)
class Origin:
    """What a stage is trained on, name -> hash, and the arguments that are the stage's own; kept with its state.

    `changed` says that they may differ from the state's; `start` is the published pipeline that it begins from.
    """

    made_from: Mapping[str, str]
    arguments: Mapping[str, Any]
    changed: bool = False
    start: Path | None = None

    @staticmethod
    def of(args: argparse.Namespace, recipe: Recipe, **made_from: str) -> Origin:
        """Return the origin that a command line tells, folders by their name alone."""
        common = {*asdict(recipe), "data", "device", "changed"}
        own = {
            name: value
            for name, value in vars(args).items()
            if name not in common and value is not None and value is not False
        }
        told = {name: value.name if isinstance(value, Path) else value for name, value in own.items()}
        return Origin(made_from, told, args.changed, args.start)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate at a step: a linear warm-up, then a cosine to 2% of the peak."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Stage:
    """One model in training: its weights, their average, the optimiser, and where their state lives.

    Parameters that do not require a gradient are given, not learned: they are neither saved nor resumed.
    """

    def __init__(
        self, name: str, model: torch.nn.Module, recipe: Recipe, data: Path, origin: Origin | None = None
    ) -> None:
        self.name, self.model, self.recipe = name, model, recipe
        self.origin = origin or Origin({}, {})
        self.path = data / "state" / name / "state.safetensors"
        self.device = next(model.parameters()).device
        self.learned = {k: p for k, p in model.named_parameters() if p.requires_grad}
        self.average = {k: p.detach().clone() for k, p in self.learned.items()}
        decay = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
        self.step = 0
        self._signal: int | None = None
        # a state is weights, average and two moments, and there are two while one is written; then the part, twice too
        need(data, 40 * sum(p.numel() for p in model.parameters()))
        self._before = history(self.origin.start, name) if self.origin.start else []
        if self.path.exists():
            self._resume()
        self._begun_at = self.step
        self._begun = self._ended = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether there is no step left to take."""
        return self.step >= self.recipe.steps

    @property
    def runs(self) -> Runs:
        """The runs that led to the weights as they are, this one too, under the stage's name."""
        if self.step == self._begun_at:
            return {self.name: self._before}
        this = {
            "from": self._begun_at,
            "to": self.step,
            "minutes": round((self._ended - self._begun) / 60, 1),
            "recipe": asdict(self.recipe),
            "arguments": dict(self.origin.arguments),
            "made_from": dict(self.origin.made_from),
        }
        return {self.name: [*self._before, this]}

    def made(self, folder: Path) -> bool:
        """Say so and return True where no step is left to take and a part is what all of them made."""
        runs = self.runs[self.name]
        made = self.finished and bool(runs) and history(folder, self.name) == runs
        if made:
            print(f"{self.name}: all {self.step} steps are taken, and {folder} was made by them", flush=True)
        return made

    def run(
        self, loss_of: Callable[[np.random.Generator], torch.Tensor], report: Callable[[], str] | None = None
    ) -> None:
        """Train until `recipe.steps`, or until SIGTERM or SIGINT, which save and leave with status 128 + signal.

        `loss_of` draws its own batch with the generator it is given, keyed by the step alone.
        """
        total = sum(p.numel() for p in self.model.parameters())
        print(f"{self.name}: {total / 1e6:.2f} M parameters, steps {self.step}..{self.recipe.steps}, {self.recipe}")
        self._begun, smooth = time.perf_counter(), None
        self.model.train()
        with self._heeding_signals():
            while not self.finished:
                value = self._update(loss_of)
                smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
                if self._due(50):
                    self._tell(smooth)
                if self._due(self.recipe.save_every):
                    self._save()
                if report is not None and not self._signal and self._due(self.recipe.report_every):
                    with self.averaged():
                        print(f"{self.name} {self.step}: {report()}", flush=True)
                    self.model.train()
                if self._signal:
                    self._save()
                    print(f"{self.name}: stopped at step {self.step}; the same command goes on from there", flush=True)
                    sys.exit(128 + self._signal)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model hold its averaged weights meanwhile, in evaluation mode."""
        self.model.eval()
        kept = {k: p.detach().clone() for k, p in self.learned.items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(values[name])

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        def heed(number: int, frame: FrameType | None) -> None:
            self._signal = number

        before = {number: signal.signal(number, heed) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.finished

    def _update(self, loss_of: Callable[[np.random.Generator], torch.Tensor]) -> float:
        """Take one step of the optimiser and of the average; return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        loss = loss_of(np.random.default_rng((self.recipe.seed, self.step)))
        value = float(loss.detach())
        if not math.isfinite(value):
            sys.exit(f"{self.name}: the loss is {value} at step {self.step}; lower --lr and run the same command again")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._ended = time.perf_counter()
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        learned = [parameter.detach() for parameter in self.learned.values()]
        torch._foreach_lerp_([self.average[name] for name in self.learned], learned, 1 - decay)
        return value

    def _tell(self, loss: float) -> None:
        pace = (time.perf_counter() - self._begun) / (self.step - self._begun_at)
        print(
            f"{self.name} {self.step}/{self.recipe.steps} loss {loss:.4f}",
            f"{pace:.2f} s/step, {pace * (self.recipe.steps - self.step) / 60:.0f} min left",
            flush=True,
        )

    def _save(self) -> None:
        given = {k for k, _ in self.model.named_parameters()} - set(self.learned)
        tensors = {f"weights.{k}": v for k, v in self.model.state_dict().items() if k not in given}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slot.items()}
        metadata = {
            "step": str(self.step),
            "recipe": json.dumps(asdict(self.recipe)),
            "made_from": json.dumps(dict(self.origin.made_from)),
            "history": json.dumps(self.runs[self.name]),
        }
        with whole(self.path) as partial:
            save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, partial, metadata)

    def _resume(self) -> None:
        with safe_open(self.path, "pt") as stored:
            metadata = stored.metadata()
        self._before = json.loads(metadata.get("history", "[]"))
        self.step = int(metadata["step"])
        self._refuse_changes(metadata)
        tensors = load_file(self.path, device=str(self.device))

        def part(name: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        # an older state holds the given parameters as they once were
        given = {k: p for k, p in self.model.named_parameters() if k not in self.learned}
        self.model.load_state_dict({**part("weights"), **given})
        average = part("average")
        for name, value in self.average.items():
            value.copy_(average[name])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in part("optimizer").items():
            index, name = key.split(".", 1)
            slots.setdefault(int(index), {})[name] = value
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})

    def _refuse_changes(self, metadata: Mapping[str, str]) -> None:
        """Print in what recipe, arguments and data differ from those of the state.

        Refuses unless the change was asked for and there are steps left to take with it.
        """
        given = self._before[-1]["arguments"] if self._before else {}
        stored = json.loads(metadata["recipe"]) | given | json.loads(metadata.get("made_from", "{}"))
        # the hash of a folder comes after, and so in place of, the folder's name among the arguments
        asked = asdict(self.recipe) | dict(self.origin.arguments) | dict(self.origin.made_from)
        differs = [name for name in asked if name in stored and name not in MAY_CHANGE and asked[name] != stored[name]]
        for name in differs:
            print(f"{self.name}: {name} is {asked[name]}, the state was trained with {stored[name]}", flush=True)
        if differs and not self.origin.changed:
            raise Refused(
                f"{self.name}: {', '.join(differs)} changed since {self.path} was saved; give --changed to go on "
                "all the same, restore what changed, or remove the state to begin anew"
            )
        if differs and self.finished:
            raise Refused(
                f"{self.name}: all {self.step} steps were taken before {', '.join(differs)} changed; ask for more "
                f"--steps than {self.step}, or remove {self.path} to begin anew"
            )
