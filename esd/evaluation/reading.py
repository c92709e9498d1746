"""Judges read folders of images: a row of images.csv for each of them, and FID and KID between two folders.

They read manifests and images and nothing else. An image that is missing or cannot be opened is a row with that state,
and counts nowhere but there; so does one of a size that a judge does not take, for no model drew it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esd.evaluation.distances import fid, kid
from esd.evaluation.generate import UNREADABLE, Drawn, Manifest
from esd.evaluation.judges import Judge, PairJudge, PromptJudge
from esd.evaluation.table import Row
from esd.evaluation.vocabulary import Target, says

BATCH = 256
MIN_IMAGES = 2  # of each folder, below which no distance between them is defined

Picture = np.ndarray | str


def opened(path: Path) -> Picture:
    """uint8 RGB (H, W, 3) of an image file, or "missing" or "corrupt"."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        return "missing"
    except UNREADABLE:
        return "corrupt"


def _fitting(picture: Picture, judges: Sequence[Judge]) -> Picture:
    """The picture, or "corrupt" where it is of another size than a judge takes."""
    sizes = {(judge.size, judge.size) for judge in judges if judge.size}
    return "corrupt" if isinstance(picture, np.ndarray) and sizes - {picture.shape[:2]} else picture


def read(
    model: str,
    manifest: Manifest,
    judges: Sequence[Judge],
    pair_judges: Sequence[PairJudge] = (),
    base: Manifest | None = None,
) -> list[Row]:
    """The rows of images.csv for a folder, in the order of its manifest.

    Args:
        model: what drew it, for the column "model".
        manifest: of the folder.
        judges: read every image.
        pair_judges: compare every image with the base's of the same file name, where both are whole and of one size.
        base: the base's manifest, for those.
    """
    rows = []
    for start in range(0, len(manifest.images), BATCH):
        images = manifest.images[start : start + BATCH]
        pictures = [_fitting(opened(manifest.folder / image.file), judges) for image in images]
        part = [_row(model, manifest, *pair) for pair in zip(images, pictures, strict=True)]
        for where, alike in _alike(pictures):
            for judge in judges:
                _fill(judge, alike, [part[i] for i in where])
        if base and pair_judges:
            before = [opened(base.folder / image.file) for image in images]
            for where, one, two in _pairs(before, pictures):
                for pair_judge in pair_judges:
                    for i, value in zip(where, pair_judge(one, two), strict=True):
                        part[i][pair_judge.name] = _written(value)
        rows += part
    return rows


def fid_and_kid(
    base: Manifest,
    erased: Manifest,
    features: Callable[[np.ndarray], np.ndarray],
    targets: Sequence[Target],
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """FID and KID between the base's images and the erased model's, of prompts that name nothing erased.

    Args:
        base, erased: of the same prompts.
        features: images (n, H, W, 3) to (n, d).
        targets: what was erased; without any, all prompts count.
        words: that name it too, in prompts without a label that would tell.

    Returns:
        {"fid", "kid", "n"}, nulls where fewer than two images of each are left.
    """
    files = [image.file for image in base.images if not _names(image, targets, words)]
    parts = []
    for start in range(0, len(files), BATCH):
        one, two = ([opened(side.folder / file) for file in files[start : start + BATCH]] for side in (base, erased))
        parts += [(features(before), features(after)) for _, before, after in _pairs(one, two)]
    n = sum(len(before) for before, _ in parts)
    if n < MIN_IMAGES:
        return {"fid": None, "kid": None, "n": n}
    before, after = (np.concatenate(side) for side in zip(*parts, strict=True))
    return {"fid": fid(before, after), "kid": kid(before, after, paired=True), "n": n}


def _names(image: Drawn, targets: Sequence[Target], words: Sequence[str]) -> bool:
    """Whether a prompt names something erased, or what it was erased from: by its labels, else in its words."""
    return any(
        target.named(image.labels)
        or target.touched(image.labels)
        or (target.domain not in image.labels and any(says(image.prompt, word) for word in (target.name, *words)))
        for target in targets
    )


def _row(model: str, manifest: Manifest, image: Drawn, picture: Picture) -> Row:
    """What a row says before a judge has read the image."""
    told = {
        "model": model,
        "file": f"{manifest.folder.name}/{image.file}",
        "case_number": str(image.case_number),
        "sample": str(image.sample),
        "prompt": image.prompt,
        "seed": str(image.seed),
        "guidance": str(image.guidance),
        "state": picture if isinstance(picture, str) else "ok",
    }
    return told | {f"label.{name}": value for name, value in image.labels.items()}


def _fill(judge: Judge, images: np.ndarray, rows: Sequence[Row]) -> None:
    """Writes what a judge reads in images into their rows."""
    readings = judge(images)
    for question in judge.questions:
        for row, name, p in zip(rows, readings.names[question], readings.p[question], strict=True):
            row[f"{judge.name}.{question}"] = name
            row[f"{judge.name}.{question}.p"] = _written(p)
    for row, parts in zip(rows, readings.parts, strict=False):
        row[f"{judge.name}.parts"] = " ".join(f"{part}={_written(p)}" for part, p in parts)
    if isinstance(judge, PromptJudge):
        for row, cosine in zip(rows, judge.agreement(images, [row["prompt"] for row in rows]), strict=True):
            row[f"{judge.name}.cos"] = _written(cosine)


def _alike(pictures: Sequence[Picture]) -> Iterator[tuple[list[int], np.ndarray]]:
    """(numbers, images of one shape) of those pictures that could be opened."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(pictures):
        if isinstance(picture, np.ndarray):
            shapes.setdefault(picture.shape, []).append(i)
    for where in shapes.values():
        yield where, np.stack([np.asarray(pictures[i]) for i in where])


def _pairs(before: Sequence[Picture], after: Sequence[Picture]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(numbers, images before, images after) of one shape, of those pairs that could be opened and are of one size."""
    whole = [one if np.shape(one) == np.shape(two) else "unlike" for one, two in zip(before, after, strict=True)]
    for where, images in _alike(whole):
        yield where, images, np.stack([np.asarray(after[i]) for i in where])


def _written(number: float) -> str:
    """A number as it stands in the table: what float32 can tell apart."""
    return f"{float(number):.7g}"
