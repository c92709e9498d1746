"""Erase concepts from a model: `python -m esd.train concepts=[cat] selection=esd_u run_dir=runs/cat`.

A thin edge: checks the settings, loads the model, says what will be trained, trains (`esd.trainer`),
measures (`esd.evaluation.erasure`), and says where the results are. The same command resumes; `accelerate
launch -m esd.train` takes the same settings; `--multirun` runs a sweep.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from esd.config.train import TrainConfig
from esd.config.train_sections import STALENESS, EvaluationConfig
from esd.drawing import peak_gib
from esd.errors import UserError
from esd.launch import check_launch, elsewhere, launched, make_accelerator, mixed_precision
from esd.main import EXIT_SIGNAL, run_program
from esd.model import check, load
from esd.run import RunDirectory, start_tracker, tracker_arguments, versions

if TYPE_CHECKING:
    from esd.evaluation.judges import Judge
    from esd.evaluation.vocabulary import Vocabulary
    from esd.families import Family
    from esd.plan import TrainPlan


def main() -> None:
    """The command line."""
    run_program("train", TrainConfig, train)


def train(config: TrainConfig) -> int:
    """Trains and measures what `config` says; returns the exit code."""
    run = RunDirectory(config.run_path(), config)
    tracker = tracker_arguments(config.tracker, run.path)
    check(config.model)
    check_launch(None if elsewhere(config) else config.training.processes)
    from esd import selection
    from esd.description import describe
    from esd.evaluation.judges import load_judge
    from esd.evaluation.vocabulary import Vocabulary

    # All that can be wrong without the base's weights is told before these are loaded.
    selection.check(config.selection)
    vocabulary = Vocabulary.load(config.model.path)
    plan = make_plan(config, vocabulary)
    judge = load_judge(config.model.path)
    accelerator = make_accelerator(config, tracker)
    family = load(config.model, accelerator.device)
    if config.training.channels_last:
        family.channels_last()
    processes = config.training.processes or accelerator.num_processes
    drawn = (config.evaluation.num_steps, config.evaluation.guidance_scale)
    accelerator.print(describe(family, plan, processes, drawn=drawn), flush=True)
    check_evaluation(judge, family, config.evaluation)
    for word in family.unknown_words([*config.concepts, *config.erase_from]):
        accelerator.print(
            f"warning: the text encoder has never seen {word!r}; it may not know what to erase",
            file=sys.stderr,
        )
    for line in memory_lines(config, family, plan, accelerator.device, processes):
        accelerator.print(f"memory     {line}", flush=True)
    if config.plan_only:
        accelerator.print(f"results    would go to {run.path}; plan_only=true, so nothing was trained")
        return 0
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    with run.claimed(main=accelerator.is_main_process):
        accelerator.wait_for_everyone()
        return finish(config, family, plan, run, accelerator, vocabulary, judge)


def memory_lines(config: TrainConfig, family: Family, plan: TrainPlan, device: Any, processes: int) -> list[str]:
    """What the run takes of the device: every phase where only the plan is asked for, else the peak of a card.

    Nothing is said of a run on the CPU: to find out takes seconds, in which a small run would be half done.
    """
    import torch

    from esd import memory

    card = config.device_memory
    if card is None and device.type == "cuda":
        card = torch.cuda.get_device_properties(device).total_memory / memory.GB
    if card is None and not config.plan_only:
        return []
    found = memory.measure(
        family,
        plan,
        family.encode(plan.prompts[:1]),
        mixed_precision=mixed_precision(config, launched()),
        processes=processes,
        images=config.evaluation.batch_size,
        guidance_scale=config.evaluation.guidance_scale,
    )
    told = found.verdict(card)
    return [*map(str, found.phases), told] if config.plan_only else [told]


def finish(
    config: TrainConfig,
    family: Family,
    plan: TrainPlan,
    run: RunDirectory,
    accelerator: Any,
    vocabulary: Vocabulary | None,
    judge: Judge | None,
) -> int:
    """Trains and measures, each unless that is done; returns the exit code."""
    import shutil
    from contextlib import nullcontext

    from esd import float8
    from esd.checkpoint import FILE_NAME

    trained = (run / FILE_NAME).is_file()
    if trained:
        check_trained(family, plan, run)
    elif code := fit(config, family, plan, run, accelerator):
        return code
    if accelerator.is_main_process:
        shutil.rmtree(run / "state", ignore_errors=True)  # of use no longer, whichever sitting got this far
        facts = measured_with(config.evaluation, vocabulary, judge)
        missing = run.unmeasured(facts)
        if trained and missing:
            print(f"trained already; measuring, for {missing}")
        if missing:
            selected = family.select(plan.selection).names  # erased weights are put on these, finer than float8 is
            with (
                float8.stored(family.denoiser, but=selected) if plan.frozen else nullcontext(),
                family.drawing() as pipe,
            ):
                measure(config, pipe, vocabulary, judge, run, facts)
    accelerator.print(f"results are in {run.path}: {FILE_NAME}, summary.json, preview.png, metrics.jsonl")
    return 0


def check_trained(family: Family, plan: TrainPlan, run: RunDirectory) -> None:
    """Refuses weights that the same settings would not give today: a model may change in its folder.

    Raises:
        UserError: the weights are of another base, or of other prompts, which come from the model's vocabulary.
    """
    from esd import checkpoint

    found = checkpoint.load(run.path)
    mend = "choose another run_dir, or remove that directory"
    try:
        checkpoint.check(family.pipe, found)
    except checkpoint.CheckpointError as error:
        raise UserError(
            f"run_dir={run.path} was trained on another base than {family.base_name} is now; {mend}"
        ) from error
    for name in ("prompts", "erase_from", "preserve"):
        if found.provenance.get(name) != list(getattr(plan, name)):
            raise UserError(f"run_dir={run.path} was trained with other {name} than the vocabulary gives now; {mend}")


def fit(config: TrainConfig, family: Family, plan: TrainPlan, run: RunDirectory, accelerator: Any) -> int:
    """Trains; returns the exit code."""
    from esd import trainer

    start_tracker(accelerator, config.tracker, run)
    try:
        trainer.train(family, plan, run.path, accelerator, versions=versions(), held=lambda: peak_gib(family))
    except trainer.Stopped as stopped:
        accelerator.print(str(stopped), file=sys.stderr)
        return EXIT_SIGNAL + stopped.signal
    finally:
        if config.tracker.name != "none":
            accelerator.end_training()
    return 0


def check_evaluation(judge: Judge | None, family: Family, wanted: EvaluationConfig) -> None:
    """Refuses before training what would fail after it.

    Raises:
        UserError: the model's scheduler takes no such number of steps, or the judge would read pictures and the
            model draws them in another size.
    """
    try:
        family.scheduler(wanted.num_steps)
    except UserError as error:
        raise UserError(f"evaluation.{error}") from error
    asked = wanted.target_images + wanted.retained_images + wanted.implied_images
    if judge and asked and family.latent_shape(judge.size) != family.sample_shape:
        raise UserError(
            f"the judge {judge.name} of {family.base_name} reads pictures of {judge.size} pixels, and the model draws "
            "others; remove it from vocabulary.json, or set evaluation.target_images=0 evaluation.retained_images=0 "
            "evaluation.implied_images=0"
        )


def measured_with(
    wanted: EvaluationConfig, vocabulary: Vocabulary | None, judge: Judge | None
) -> dict[str, dict[str, Any] | str | None]:
    """What rates depend on besides the weights; summary.json says it, and other facts measure again."""
    import dataclasses

    identity = ("name", "version", "threshold", "hash")
    return {
        "judge": {name: getattr(judge, name) for name in identity} if judge else None,
        "vocabulary": vocabulary.hash if vocabulary else None,
        "evaluation": dataclasses.asdict(wanted),
    }


def measure(
    config: TrainConfig,
    pipe: Any,
    vocabulary: Vocabulary | None,
    judge: Judge | None,
    run: RunDirectory,
    facts: dict[str, Any],
) -> None:
    """Writes preview.png and summary.json, with these facts in it, and prints the rates."""
    from esd import checkpoint
    from esd.evaluation.erasure import DrawSettings, evaluate
    from esd.evaluation.words import changes
    from esd.storage import write_json

    trained = checkpoint.load(run.path)
    wanted = config.evaluation
    rates = evaluate(
        pipe,
        trained,
        config.concepts,
        vocabulary=vocabulary,
        judge=judge,
        target_images=wanted.target_images,
        retained_images=wanted.retained_images,
        implied_images=wanted.implied_images,
        preview_images=wanted.preview_images,
        settings=DrawSettings(wanted.num_steps, wanted.guidance_scale, wanted.batch_size),
        picture=run / "preview.png",
        erase_from=config.erase_from,
    )
    told = {name: trained.provenance.get(name) for name in ("seconds", "peak_gib", "parameters")} | {
        "seed": config.seed
    }
    reason = rates.pop("reason")
    write_json(run / "summary.json", rates | told | facts | {"reason": reason})
    for line in changes(rates.items()):
        print(line)
    if reason:
        print(f"no rates: {reason}")
    elif rates["neither"] is not None:
        print(f"{'neither':<14} {rates['neither']:.1%} of the target images show nothing the judge knows")


def make_plan(config: TrainConfig, vocabulary: Vocabulary | None) -> TrainPlan:
    """The plan of a checked configuration: templates filled in, sections mapped to what the trainer takes.

    Raises:
        UserError: a template needs a vocabulary that the model does not ship, or two concepts are one to it; or see
            `TrainPlan`.
    """
    import dataclasses

    from esd.evaluation.prompts import say
    from esd.evaluation.vocabulary import expand_prompts, in_turns, spared_prompts
    from esd.lora import Lora
    from esd.objectives import Objective
    from esd.plan import TrainPlan
    from esd.sources import Sampling

    def filled(concepts: list[str]) -> tuple[str, ...]:
        templates = [say(template, {"": concept}) for template in config.prompts for concept in concepts]
        return tuple(in_turns(expand_prompts(templates, vocabulary, but=named)))

    if vocabulary:
        refuse_twins(config.concepts, vocabulary)
    named = vocabulary.targets(config.concepts) if vocabulary else []
    erased = vocabulary.targets(config.concepts, config.erase_from) if vocabulary else []
    path: Any = config.trajectory  # its strings have been checked to be the literals asked for
    staleness = path.staleness or (STALENESS if path.rollouts else 1)
    weights: Any = config.weights
    training = dataclasses.asdict(config.training)
    for name in ("mixed_precision", "channels_last", "processes"):  # the accelerator's, the model's, the launcher's
        del training[name]
    return TrainPlan(
        concepts=tuple(config.concepts),
        prompts=filled(config.concepts),
        selection=config.selection,
        lora=Lora(weights.rank, weights.alpha or float(weights.rank)) if weights.rank else None,
        frozen=weights.frozen,
        masters=weights.masters,
        erase_from=filled(config.erase_from),
        preserve=tuple(in_turns(spared_prompts(config.preserve.prompts, vocabulary, erased))),
        preserve_weight=config.preserve.weight,
        objective=Objective(**dataclasses.asdict(config.objective)),
        sampling=Sampling(
            path.num_steps,
            path.guidance_scale,
            path.time_rule,
            path.scheduler,
            path.max_batch,
            path.size,
            path.negative,
            path.scaled_input,
        ),
        sampler=path.sampler,
        sample_with=path.sample_with,
        rollouts=path.rollouts,
        reuse=path.reuse,
        staleness=staleness if path.sampler == "student" else None,
        seed=config.seed,
        **training | {"betas": tuple(config.training.betas)},
    )


def refuse_twins(concepts: list[str], vocabulary: Vocabulary) -> None:
    """Raises UserError for two concepts that are one thing or style to the model."""
    known: dict[Any, str] = {}
    for concept in concepts:
        if found := vocabulary.find(concept):
            if found in known:
                raise UserError(
                    f"concepts={concepts}: {known[found]!r} and {concept!r} are both {found[1].name!r} to this model; "
                    "allowed: each once"
                )
            known[found] = concept


if __name__ == "__main__":
    main()
