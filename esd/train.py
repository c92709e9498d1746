"""Erase concepts from a model: `python -m esd.train concepts=[cat] selection=esd_u run_dir=runs/cat`.

A thin edge: checks the settings, loads the model, says what will be trained, trains (`esd.trainer`),
measures (`esd.evaluation.erasure`), and says where the results are. The same command resumes; `accelerate
launch -m esd.train` takes the same settings; `--multirun` runs a sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd.config import TrainConfig
from esd.errors import UserError
from esd.main import EXIT_SIGNAL, run_program
from esd.run import RunDirectory, start_tracker, tracker_arguments, versions

if TYPE_CHECKING:
    from esd.evaluation.vocabulary import Vocabulary
    from esd.families import Family
    from esd.trainer import TrainPlan


def main() -> None:
    """The command line."""
    run_program("train", TrainConfig, train)


def train(config: TrainConfig) -> int:
    """Trains and measures what `config` says; returns the exit code."""
    run = RunDirectory(config.run_path(), config)
    tracker = tracker_arguments(config.tracker, run.path)
    from esd.checkpoint import FILE_NAME
    from esd.families import check_model

    check_model(config.model.path)  # needs no weights and no network: before anything is loaded
    from esd.trainer import describe

    accelerator = make_accelerator(config, tracker)
    family, vocabulary = load(config, accelerator.device)
    plan = make_plan(config, vocabulary)
    accelerator.print(describe(family, plan, accelerator.num_processes), flush=True)
    for word in family.unknown_words([*config.concepts, *config.erase_from]):
        accelerator.print(
            f"warning: the text encoder has never seen {word!r}; it may not know what to erase",
            file=sys.stderr,
        )
    if config.plan_only:
        accelerator.print(f"results    would go to {run.path}; plan_only=true, so nothing was trained")
        return 0
    trained, measured = (run / FILE_NAME).is_file(), run.evaluated
    judge = None if trained and measured else judge_of(config.model.path)  # a damaged one costs no training
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if accelerator.is_main_process:
        run.create()
    accelerator.wait_for_everyone()
    if not trained:
        code = fit(config, family, plan, run, accelerator)
        if code:
            return code
    if accelerator.is_main_process and not (trained and measured):
        measure(config, family, vocabulary, judge, run)
    accelerator.print(f"results are in {run.path}: {FILE_NAME}, summary.json, preview.png, metrics.jsonl")
    return 0


def fit(config: TrainConfig, family: Family, plan: TrainPlan, run: RunDirectory, accelerator: Any) -> int:
    """Trains and removes the resumable state; returns the exit code."""
    import shutil

    from esd import trainer

    start_tracker(accelerator, config.tracker, run)
    try:
        trainer.train(family, plan, run.path, accelerator, versions=versions())
    except trainer.Stopped as stopped:
        accelerator.print(str(stopped), file=sys.stderr)
        return EXIT_SIGNAL + stopped.signal
    finally:
        if config.tracker.name != "none":
            accelerator.end_training()
    if accelerator.is_main_process:
        shutil.rmtree(run / "state", ignore_errors=True)
    return 0


def judge_of(model: str) -> Any:
    """The judge of a model; None where it ships none.

    Raises:
        UserError: it ships a damaged one.
    """
    from esd.evaluation.judges import load_judge

    try:
        return load_judge(model)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"model.path={model}: its judge cannot be read ({error!r}); restore that folder") from error


def measure(config: TrainConfig, family: Family, vocabulary: Vocabulary | None, judge: Any, run: RunDirectory) -> None:
    """Writes preview.png and summary.json, and prints the rates."""
    import dataclasses

    from esd import checkpoint
    from esd.evaluation.erasure import Sampling, evaluate
    from esd.storage import write_json

    told = checkpoint.load(run.path).provenance
    wanted = config.evaluation
    rates = evaluate(
        family.pipe,
        run.path,
        config.concepts,
        vocabulary=vocabulary,
        judge=judge,
        target_images=wanted.target_images,
        retained_images=wanted.retained_images,
        preview_images=wanted.preview_images,
        sampling=Sampling(wanted.num_steps, wanted.guidance_scale, wanted.batch_size),
        picture=run / "preview.png",
    )
    facts = {
        "seconds": told["seconds"],
        "parameters": told["parameters"],
        "seed": config.seed,
        "judge": judge and {name: getattr(judge, name) for name in ("name", "version", "threshold", "hash")},
        "evaluation": dataclasses.asdict(wanted),
    }
    summary = {name: value for name, value in rates.items() if name != "reason"} | facts | {"reason": rates["reason"]}
    write_json(run / "summary.json", summary)
    for name, rate in rates.items():
        if isinstance(rate, dict) and rate["n"]:
            low, high = rate["interval"]
            print(
                f"{name:<14} {rate['before']:.1%} -> {rate['after']:.1%}  (95%: {low:.1%} to {high:.1%}, n={rate['n']})"
            )
    if rates["reason"]:
        print(f"no rates: {rates['reason']}")
    elif rates["neither"] is not None:
        print(f"{'neither':<14} {rates['neither']:.1%} of the target images show nothing the judge knows")


def make_accelerator(config: TrainConfig, tracker: dict[str, Any]) -> Any:
    """The Accelerator for a device and a precision.

    Raises:
        UserError: the machine has no such device.
    """
    import os

    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # jobs of a sweep may differ in device and precision
    find_device(config.device)
    mixed = mixed_precision(config, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)
    return Accelerator(mixed_precision=mixed, cpu=config.device == "cpu", **tracker)


def mixed_precision(config: TrainConfig, launched: str) -> str:
    """The autocast of a run; `auto` is bf16 over a bfloat16 base, else what `accelerate launch` was told.

    Raises:
        UserError: the launcher was told something other than no or bf16, and the settings do not say.
    """
    if config.training.mixed_precision != "auto":
        return config.training.mixed_precision
    if launched not in ("no", "bf16"):
        raise UserError(
            f"accelerate launch --mixed_precision {launched}: allowed: no, bf16; or training.mixed_precision=no here"
        )
    return "bf16" if config.model.precision == "bfloat16" else launched


def find_device(name: str) -> str:
    """The torch device of a setting; "auto" takes the best there is.

    Raises:
        UserError: the machine has no such device.
    """
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    kind, _, index = name.partition(":")
    if not has[kind] or (index and int(index) >= torch.cuda.device_count()):
        there = [kind for kind, is_there in has.items() if is_there]
        raise UserError(f"device={name} is not in this machine; allowed: auto, {', '.join(there)}")
    return name


def load(config: Any, device: Any) -> tuple[Family, Vocabulary | None]:
    """The model's family and what it knows, as `config.model` names it."""
    import diffusers
    import torch
    import transformers

    from esd.evaluation.vocabulary import Vocabulary
    from esd.families import family_of, load_pipeline

    model = config.model
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # loading takes a second; training has a bar of its own
    pipe = load_pipeline(model.path, getattr(torch, model.precision), device, model.revision)
    return family_of(pipe), Vocabulary.load(Path(model.path))


def make_plan(config: TrainConfig, vocabulary: Vocabulary | None) -> TrainPlan:
    """The plan of a checked configuration: templates filled in, sections mapped to what the trainer takes.

    Raises:
        UserError: a template needs a vocabulary that the model does not ship.
    """
    import dataclasses

    from esd.evaluation.prompts import say
    from esd.evaluation.vocabulary import expand_prompts, in_turns
    from esd.objectives import Objective
    from esd.sources import Sampling
    from esd.trainer import TrainPlan

    def filled(concepts: list[str]) -> tuple[str, ...]:
        templates = [say(template, {"": concept}) for template in config.prompts for concept in concepts]
        return tuple(in_turns(expand_prompts(templates, vocabulary, but=config.concepts)))

    path: Any = config.trajectory  # its strings have been checked to be the literals asked for
    training = dataclasses.asdict(config.training)
    del training["mixed_precision"]  # the accelerator's
    return TrainPlan(
        concepts=tuple(config.concepts),
        prompts=filled(config.concepts),
        selection=config.selection,
        erase_from=filled(config.erase_from),
        preserve=tuple(in_turns(expand_prompts(config.preserve.prompts, vocabulary, but=config.concepts))),
        preserve_weight=config.preserve.weight,
        objective=Objective(**dataclasses.asdict(config.objective)),
        sampling=Sampling(
            path.num_steps, path.guidance_scale, path.time_rule, path.scheduler, path.max_batch, path.size
        ),
        sampler=path.sampler,
        sample_with=path.sample_with,
        rollouts=path.rollouts,
        reuse=path.reuse,
        seed=config.seed,
        **training | {"betas": tuple(config.training.betas)},
    )


if __name__ == "__main__":
    main()
