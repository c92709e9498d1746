"""What programs that draw share: the prompts of a setting, the share of each process, base and erased drawn in turn."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from esd.config.evaluate import EvaluateConfig
from esd.config.generate import GenerateConfig
from esd.errors import UserError
from esd.launch import processes
from esd.model import find_device
from esd.run import RunDirectory, versions

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from esd.checkpoint import Erased
    from esd.evaluation.generate import Manifest, Share
    from esd.evaluation.prompts import PromptRow
    from esd.evaluation.vocabulary import Vocabulary
    from esd.families import Family

TOLD_CUTS = 3
LONGEST_WAIT = timedelta(days=7)  # for the other processes; the default of ten minutes is a few pictures of FLUX


def announce(text: str, *, warning: bool = False) -> None:
    """Prints a line, or a warning on stderr, once over all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}" if warning else text, file=sys.stderr if warning else sys.stdout, flush=True)


def announce_lost(model: str, lost: str) -> None:
    """Warns of images of a model that are not there, or cannot be opened."""
    announce(
        f"images of {model}: {lost}; they count in no rate; remove what is corrupt, and the same command draws it anew",
        warning=True,
    )


def announce_drawing(config: GenerateConfig, rows: list[PromptRow], found: Erased | None) -> None:
    """Prints how many images will be drawn, with which model, without what and under what.

    Raises:
        UserError: an intervention cannot be read.
    """
    from esd.interventions.written import read

    read(config.interventions)
    erased = f", and again without {', '.join(found.provenance.get('concepts', ()))}" if found else ""
    images = len(rows) * config.images_per_prompt
    announce(f"draw {images} images of {len(rows)} prompts with {config.model.path}{erased}")
    if config.interventions:
        announce(f"under {', '.join(config.interventions)}")


def rows_of(config: GenerateConfig) -> list[PromptRow]:
    """The prompts that the settings name, templates filled from what the model knows.

    Raises:
        UserError: see `esd.evaluation.promptsets.find` and `esd.evaluation.prompts.load`.
    """
    from esd.evaluation import promptsets
    from esd.evaluation.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(config.model.path)
    names = {"thing": vocabulary.names("thing"), "style": vocabulary.names("style")} if vocabulary else None
    samples, guidance = config.images_per_prompt, config.guidance_scale
    rows, told = promptsets.find(config.prompts, seed=config.seed, samples=samples, guidance=guidance, names=names)
    for line in told:
        announce(line)
    return [replace(row, labels=vocabulary.labels(row.labels)) for row in rows] if vocabulary else rows


def limited(rows: list[PromptRow], limit: int | None) -> list[PromptRow]:
    """At most `limit` rows, evenly spaced over all of them, so that a set's groups all have their share."""
    from esd.evaluation.vocabulary import evenly_spaced

    return rows if limit is None else evenly_spaced(rows, limit)


def refuse_several_processes(config: EvaluateConfig) -> None:
    """Raises UserError in a launch of several processes, for a suite whose work cannot be shared out."""
    if processes() > 1:
        raise UserError(f"suite={config.suite.name} runs in one process; start it as python -m esd.evaluate ...")


def peak_gib(family: Family) -> dict[str, float]:
    """Most memory that this process held so far, in GiB: of the machine, if it tells, and of the family's GPU."""
    import torch

    told: dict[str, float] = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        told["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    if family.device.type == "cuda":
        told["gpu"] = torch.cuda.max_memory_allocated(family.device) / 2**30
    return told


def find_share(device: str) -> tuple[Share, torch.device | str]:
    """The share of this process of a launch, and the device that it draws on.

    Raises:
        UserError: the machine has no such device.
    """
    from esd.evaluation.generate import Share

    found = find_device(device)
    if processes() == 1:
        return Share(), found
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=LONGEST_WAIT)
    announce(f"shared out among {state.num_processes} processes")
    return Share(state.process_index, state.num_processes, state.wait_for_everyone), state.device


def plan(
    config: GenerateConfig, rows: list[PromptRow], family: Family, found: Erased | None, run: RunDirectory
) -> dict[str, Manifest]:
    """What is drawn into the folders `base` and `erased` of a run; also says what the text encoder does not read.

    Raises:
        UserError: the model takes no such number of steps or size of picture, an intervention does nothing, the weights
            are of another base, or a folder holds other images.
    """
    from esd import checkpoint
    from esd.evaluation import generate

    family.scheduler(config.num_steps)  # tells whether it knows so many
    generate.check_sizes(family, rows)
    if found:
        checkpoint.check(family.pipe, found)
    base, cut = generate.base_of(family), family.cut([row.prompt for row in rows])
    announce_cuts(cut)
    drawn_with = versions() | {"device": family.device.type}

    def images(folder: Path, weights: Path | None) -> Manifest:
        return generate.plan(
            rows,
            folder,
            base=base,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            images_per_prompt=config.images_per_prompt,
            checkpoint=weights,
            cut=cut,
            drawn_with=drawn_with,
            interventions=config.interventions,
        )

    plans = {"base": images(run / "base", None)}
    announce_sites(config, family, {image.guidance for image in plans["base"].images})
    return plans | ({"erased": images(run / "erased", found.path)} if found else {})


def announce_sites(config: GenerateConfig, family: Family, guidances: set[float]) -> None:
    """Prints where each intervention takes hold.

    Args:
        config: that asks for them.
        family: of the model.
        guidances: classifier-free guidance of the images.

    Raises:
        UserError: one takes hold nowhere, or would change nothing.
    """
    from esd.interventions.sampling import planned
    from esd.interventions.sites import describe
    from esd.interventions.written import read

    for text, op in zip(config.interventions, read(config.interventions), strict=True):
        sites = op.sites(family)
        for guidance in sorted(guidances):
            op.fits(planned(family, config.num_steps, guidance, [""]), sites)
        announce(f"{text}: {describe(sites)}")


def announce_cuts(cut: dict[str, str]) -> None:
    """Warns of prompts that are too long: the first few in words, the rest as a number; what is left has them all."""
    for prompt, end in list(cut.items())[:TOLD_CUTS]:
        announce(f"{prompt[:60]!r}... is too long; the text encoder does not read {end!r}", warning=True)
    if len(cut) > TOLD_CUTS:
        announce(f"{len(cut) - TOLD_CUTS} more prompts are too long; all stand under 'cut'", warning=True)


def draw(
    config: GenerateConfig, plans: dict[str, Manifest], family: Family, found: Erased | None, share: Share
) -> None:
    """Draws what is planned, this process its share; the pipeline is the base again afterwards."""
    from pathlib import Path

    from esd import checkpoint
    from esd.evaluation.generate import generate
    from esd.interventions import attach
    from esd.interventions.written import read

    kept, ops = Path(config.base_images) if config.base_images else None, read(config.interventions)
    with family.drawing() as pipe, attach(family, *ops) if ops else nullcontext():
        generate(pipe, plans["base"], batch_size=config.batch_size, share=share, kept=kept)
        if found:
            with checkpoint.erased(pipe, found):
                generate(pipe, plans["erased"], batch_size=config.batch_size, share=share)


def look_inside(
    config: EvaluateConfig, family: Family, found: Erased, vocabulary: Vocabulary | None
) -> dict[str, Any] | None:
    """`esd.evaluation.denoiser.look` as the settings ask for it; None where they ask for no points."""
    from esd.evaluation.denoiser import look

    if not config.denoiser_points:
        return None
    return look(
        family,
        found,
        vocabulary,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        max_points=config.denoiser_points,
        max_batch=2 * config.batch_size,
    )
