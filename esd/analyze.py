"""Look inside a model, and see what an erasure changed in it.

    python -m esd.analyze analysis=layers checkpoint=runs/cat run_dir=runs/cat-layers

Every analysis leaves figures (`NAME.png`), tables (`NAME.csv`) and `captions.md`, which says what is seen. With a
checkpoint it looks at the erased model beside the base. The same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from esd.config.analyze import AnalyzeConfig
from esd.drawing import announce
from esd.errors import UserError
from esd.launch import processes
from esd.main import run_program
from esd.model import check, find_device, load
from esd.run import RunDirectory

if TYPE_CHECKING:
    from torch import nn
    from tqdm import tqdm

    from esd.analysis import Subject
    from esd.checkpoint import Erased
    from esd.evaluation.judges import EmojiJudge

TOLD_BY_FACTS = ("model.path", "model.revision", "checkpoint")  # what lies there, facts.json says by its hash


def main() -> None:
    """The command line."""
    run_program("analyze", AnalyzeConfig, analyze)


def analyze(config: AnalyzeConfig) -> int:
    """Looks at what `config` says; returns the exit code."""
    config.settings.check_run(config.checkpoint, config.num_steps)
    run = RunDirectory(config.run_path(), config, unused=config.unused(), neutral=TOLD_BY_FACTS)
    from esd import checkpoint
    from esd.evaluation.judges import load_judge

    if processes() > 1:
        raise UserError("esd.analyze runs in one process; start it as python -m esd.analyze ...")
    check(config.model)
    found = checkpoint.load(config.checkpoint) if config.checkpoint else None
    judge = load_judge(config.model.path)
    device = find_device(config.device)
    beside = f", and without {', '.join(found.provenance.get('concepts', ()))}" if found else ""
    announce(f"look at {config.analysis.name} of {config.model.path}{beside}")
    announce(", ".join(f"{name}={value}" for name, value in vars(config.settings).items()))
    if config.plan_only:
        announce(f"results would go to {run.path}; plan_only=true, so nothing was looked at")
        return 0
    from esd.analysis import Results
    from esd.progress import say

    subject = find_subject(config, found, judge, device)
    module: Any = import_module(f"esd.analysis.{config.analysis.name}")
    with run.claimed(), counted(subject.family.denoiser) as progress:
        results = Results(run.path, report=partial(say, progress))
        module.analyse(subject, results, **dataclasses.asdict(config.settings))
    for line in results.notes:
        announce(line)
    announce(f"results are in {results.told()}")
    return 0


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[tqdm[Any]]:
    """A progress bar of the rows that a denoiser evaluates, for the length of a `with` block."""
    from esd.progress import bar

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        progress.update(len([*args, *kwargs.values()][0]))

    with bar("denoiser", unit="row") as progress:
        hook = denoiser.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield progress
        finally:
            hook.remove()


def find_subject(config: AnalyzeConfig, found: Erased | None, judge: EmojiJudge | None, device: str) -> Subject:
    """The model, loaded, as analyses get it.

    Raises:
        UserError: the checkpoint is of another base, or the model takes no such number of steps.
    """
    from esd import checkpoint
    from esd.analysis import Subject
    from esd.evaluation.vocabulary import Vocabulary

    family = load(config.model, device)
    family.scheduler(config.num_steps)  # tells whether it knows so many
    if found:
        checkpoint.check(family.pipe, found)
    for line in family.advice(config.num_steps, config.guidance_scale):
        announce(line, warning=True)
    if judge and judge.size and family.latent_shape(judge.size) != family.sample_shape:
        announce(f"{judge.name} reads pictures of {judge.size} pixels, and the model's are not; pixels are compared")
        judge = None
    family.place("denoiser", "vae")
    family.denoiser.requires_grad_(False)
    return Subject(
        family, found, Vocabulary.load(config.model.path), judge, num_steps=config.num_steps,
        guidance_scale=config.guidance_scale, seed=config.seed, batch_size=config.batch_size,
    )  # fmt: skip


if __name__ == "__main__":
    main()
