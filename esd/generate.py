"""Draw prompts with a base and its erased model, side by side.

    python -m esd.generate checkpoint=runs/cat prompts='[a cat, a dog]' run_dir=runs/cat-images

Leaves `base/` and `erased/` with one PNG per prompt and sample, a manifest in each, and `contact_sheet.png`
with both side by side. Images that are there already are kept, so the same command resumes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esd.config import GenerateConfig
from esd.main import run_program
from esd.model import check, find_device, load
from esd.run import RunDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from esd.evaluation.generate import Manifest
    from esd.evaluation.prompts import PromptRow

SHEET_ROWS, SHEET_COLUMNS = 40, 6


def main() -> None:
    """The command line."""
    run_program("generate", GenerateConfig, generate)


def generate(config: GenerateConfig) -> int:
    """Draws what `config` says; returns the exit code."""
    run = RunDirectory(config.run_path(), config)
    from esd import checkpoint
    from esd.evaluation.generate import base_of
    from esd.evaluation.generate import generate as draw
    from esd.evaluation.prompts import load as load_prompts

    check(config.model)
    rows = load_prompts(config.prompts, seed=config.seed)
    found = checkpoint.load(config.checkpoint) if config.checkpoint else None
    images = len(rows) * config.images_per_prompt
    print(
        f"draw {images} images of {len(rows)} prompts with {config.model.path}"
        + (f", and again without {', '.join(found.provenance.get('concepts', ()))}" if found else "")
    )
    if config.plan_only:
        print(f"results would go to {run.path}; plan_only=true, so nothing was drawn")
        return 0
    family = load(config.model, find_device(config.device))
    family.scheduler(config.num_steps)  # tells whether it knows so many
    base = base_of(family)
    plans = {"base": plan(config, rows, run / "base", base, None)}
    if found:
        plans["erased"] = plan(config, rows, run / "erased", base, found.path)
        checkpoint.check(family.pipe, found)  # another base is refused before anything is written
    with run.claimed(), family.drawing() as pipe:
        draw(pipe, plans["base"], batch_size=config.batch_size)
        if found:
            with checkpoint.erased(pipe, found):
                draw(pipe, plans["erased"], batch_size=config.batch_size)
        contact_sheet(plans, rows, run)
    print(f"results are in {run.path}: contact_sheet.png, {', '.join(f'{name}/' for name in plans)}")
    return 0


def plan(
    config: GenerateConfig,
    rows: list[PromptRow],
    folder: Path,
    base: dict[str, str | None],
    weights: Path | None,
) -> Manifest:
    """What is drawn into a folder; refuses a folder that holds other images."""
    from esd.evaluation.generate import plan as plan_images

    return plan_images(
        rows,
        folder,
        base=base,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        images_per_prompt=config.images_per_prompt,
        checkpoint=weights,
    )


def contact_sheet(manifests: dict[str, Manifest], rows: list[PromptRow], run: RunDirectory) -> None:
    """Writes contact_sheet.png: a row for each prompt, a column for each sample, the models side by side."""
    import numpy as np
    from PIL import Image

    from esd.evaluation.preview import Row
    from esd.evaluation.preview import draw as draw_page

    samples = max(image.sample for image in manifests["base"].images) + 1
    columns, shown = range(min(samples, SHEET_COLUMNS)), rows[:SHEET_ROWS]

    def image(name: str, row: PromptRow, sample: int) -> np.ndarray:
        with Image.open(run / name / f"{row.case_number}_{sample}.png") as opened:
            return np.asarray(opened.convert("RGB"))

    lines = [
        Row(
            row.prompt,
            "",
            np.stack([np.stack([image(name, row, sample) for name in manifests]) for sample in columns]),
        )
        for row in shown
    ]
    rest = "" if len(shown) == len(rows) else f" (the first {len(shown)} of {len(rows)} prompts)"
    draw_page(
        run / "contact_sheet.png",
        lines,
        [f"sample {sample + 1}" for sample in columns],
        title=f"{' and '.join(manifests)}{rest}",
        versions=tuple(manifests),
    )


if __name__ == "__main__":
    main()
