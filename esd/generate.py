"""Draw prompts with a base and its erased model, side by side.

    python -m esd.generate checkpoint=runs/cat prompts='[a cat, a dog]' run_dir=runs/cat-images

Leaves `base/` and `erased/` with one PNG per prompt and sample, a manifest in each, and `contact_sheet.png`
with both side by side. Images that are there already are kept, so the same command resumes, and `accelerate launch
-m esd.generate` shares the images out among its processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esd.config.generate import GenerateConfig
from esd.drawing import announce, announce_drawing, draw, find_share, plan, rows_of
from esd.errors import UserError
from esd.main import run_program
from esd.model import check, load
from esd.run import RunDirectory

if TYPE_CHECKING:
    import numpy as np

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

    check(config.model)
    rows = rows_of(config)
    found = checkpoint.load(config.checkpoint) if config.checkpoint else None
    announce_drawing(config, rows, found)
    if config.plan_only:
        announce(f"results would go to {run.path}; plan_only=true, so nothing was drawn")
        return 0
    share, device = find_share(config.device)
    family = load(config.model, device)
    plans = plan(config, rows, family, found, run)
    share.wait()  # all have looked before the first one writes
    with run.claimed(main=share.index == 0):
        share.wait()
        draw(config, plans, family, found, share)
        if share.index == 0:
            contact_sheet(plans, rows, run)
    announce(f"results are in {run.path}: contact_sheet.png, {', '.join(f'{name}/' for name in plans)}")
    return 0


def contact_sheet(manifests: dict[str, Manifest], rows: list[PromptRow], run: RunDirectory) -> None:
    """Writes contact_sheet.png: a row for each prompt, a column for each sample, the models side by side.

    Raises:
        UserError: an image is damaged.
    """
    import numpy as np

    from esd.evaluation.preview import Row
    from esd.evaluation.preview import draw as draw_page
    from esd.evaluation.reading import opened

    samples = max(image.sample for image in manifests["base"].images) + 1
    columns, shown = range(min(samples, SHEET_COLUMNS)), rows[:SHEET_ROWS]

    def image(name: str, row: PromptRow, sample: int) -> np.ndarray:
        path = run / name / f"{row.case_number}_{sample}.png"
        picture = opened(path)
        if isinstance(picture, str):
            raise UserError(f"{path} is {picture}; remove it, and the same command draws it anew")
        return picture

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
