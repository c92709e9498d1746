"""Images from a stock pipeline, one CPU generator per image, so that no image depends on its neighbours.

An image is decided by prompt, seed, guidance and weights, not by batch size, order or what was drawn before
(up to rounding, which a batch may change in the last bit). Files are written atomically and existing ones
are kept, so the same call after an interruption draws only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from esd.checkpoint import fingerprint
from esd.errors import UserError
from esd.evaluation.prompts import PromptRow
from esd.families import Family
from esd.storage import atomic, write_json


@dataclass(frozen=True)
class Drawn:
    """One image of a manifest: its file name and everything that decided it but the weights."""

    file: str
    case_number: int
    sample: int
    prompt: str
    seed: int
    guidance: float
    labels: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a folder of images holds; judges read this and the images, nothing else.

    Attributes:
        folder: of the images and of manifest.json.
        base: what `base_of` says of the model.
        checkpoint: the erased weights they were drawn with, or None for the base.
        sha256: of the file of these weights, or None for the base.
        num_steps: sampling steps.
        images: in the order of the prompts.
    """

    folder: Path
    base: Mapping[str, str | None]
    checkpoint: str | None
    sha256: str | None
    num_steps: int
    images: tuple[Drawn, ...]

    def save(self) -> None:
        """Writes folder/manifest.json."""
        told = {
            "base": self.base,
            "checkpoint": self.checkpoint,
            "sha256": self.sha256,
            "num_steps": self.num_steps,
            "images": [asdict(i) for i in self.images],
        }
        write_json(self.folder / "manifest.json", told)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            UserError: there is none.
        """
        try:
            told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            return cls(
                folder,
                told["base"],
                told["checkpoint"],
                told.get("sha256"),
                told["num_steps"],
                tuple(Drawn(**image) for image in told["images"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} holds no manifest.json of images ({error}); draw them with esd.generate"
            ) from error


def base_of(family: Family) -> dict[str, str | None]:
    """What identifies a base: its name, its commit on the hub, and a hash of values of each tensor of its denoiser."""
    values = json.dumps(fingerprint(dict(family.denoiser.named_parameters())), sort_keys=True)
    return {
        "name": family.base_name,
        "revision": family.base_revision,
        "fingerprint": hashlib.sha256(values.encode()).hexdigest(),
    }


def plan(
    rows: Sequence[PromptRow],
    out_dir: Path,
    *,
    base: Mapping[str, str | None],
    num_steps: int,
    guidance_scale: float,
    images_per_prompt: int = 1,
    checkpoint: Path | None = None,
) -> Manifest:
    """The manifest of what is to be drawn into `out_dir/{case}_{sample}.png`; writes nothing.

    Args:
        rows: what to draw; sample s of a row uses its evaluation_seed + s.
        out_dir: of the images; need not exist.
        base: see `base_of`.
        num_steps: sampling steps.
        guidance_scale: of rows that set none.
        images_per_prompt: samples of each row.
        checkpoint: the file of erased weights, or None for the base.

    Raises:
        UserError: the folder holds images of another base, other weights, steps, prompts, seeds or guidance.
    """
    images = tuple(
        Drawn(
            f"{row.case_number}_{sample}.png",
            row.case_number,
            sample,
            row.prompt,
            row.evaluation_seed + sample,
            guidance_scale if row.guidance is None else row.guidance,
            dict(row.labels),
        )
        for row in rows
        for sample in range(images_per_prompt)
    )
    digest = None if checkpoint is None else hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    planned = Manifest(out_dir, base, None if checkpoint is None else str(checkpoint), digest, num_steps, images)
    if (out_dir / "manifest.json").exists():
        _refuse_others(Manifest.load(out_dir), planned)
    return planned


def generate(pipe: Any, planned: Manifest, *, batch_size: int) -> Manifest:
    """Draws what is planned, and writes the manifest first, so that it vouches for every image in the folder.

    Args:
        pipe: a stock text-to-image pipeline, with erased weights already applied if there are any.
        planned: from `plan`; its folder is made if need be, and images that its manifest lists are kept.
        batch_size: images per call.
    """
    out_dir, num_steps = planned.folder, planned.num_steps
    listed = {image.file for image in Manifest.load(out_dir).images} if (out_dir / "manifest.json").exists() else set()
    for image in planned.images:
        if image.file not in listed:  # left by who knows what
            (out_dir / image.file).unlink(missing_ok=True)
    planned.save()
    missing = [image for image in planned.images if not (out_dir / image.file).exists()]
    for batch in _batches(missing, batch_size):
        arrays = sample(
            pipe,
            [i.prompt for i in batch],
            [i.seed for i in batch],
            num_steps=num_steps,
            guidance_scale=batch[0].guidance,
            batch_size=batch_size,
        )
        for image, array in zip(batch, arrays, strict=True):
            with atomic(out_dir / image.file) as staged:
                Image.fromarray(array).save(staged, format="PNG")
    return planned


def _refuse_others(here: Manifest, now: Manifest) -> None:
    """Raises UserError where the images of a manifest are not those that are asked for now."""
    facts = [
        *((f"the base's {name}", here.base.get(name), value) for name, value in now.base.items()),
        ("the checkpoint's sha256", (here.sha256 or "none")[:12], (now.sha256 or "none")[:12]),
        ("num_steps", here.num_steps, now.num_steps),
    ]
    known = {image.file: image for image in here.images}
    for image in now.images:
        if old := known.get(image.file):
            facts += [
                (f"{image.file}: {name}", getattr(old, name), getattr(image, name))
                for name in ("prompt", "seed", "guidance")
            ]
    for name, there, wanted in facts:
        if there != wanted:
            raise UserError(
                f"{now.folder} holds other images ({name} is {there!r} there, {wanted!r} here); choose another run_dir"
            )


def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> np.ndarray:
    """uint8 images (n, H, W, 3) of n prompts, image i drawn from a CPU generator seeded with seeds[i].

    Args:
        pipe: a stock pipeline; its progress bar is switched off.
        prompts: n texts.
        seeds: n seeds.
        num_steps: sampling steps.
        guidance_scale: classifier-free guidance; 1 or less means none.
        batch_size: images per call.

    Raises:
        UserError: the pipeline draws values that are not finite.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch_size):
        now = slice(start, start + batch_size)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[now]]
        drawn = np.asarray(
            pipe(
                prompt=list(prompts[now]),
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="np",
            ).images
        )
        if not np.isfinite(drawn).all():  # 8 bits would show them as black
            raise UserError(
                f"a picture of {prompts[start]!r} or of a prompt drawn with it is not finite, in {pipe.dtype}; set "
                "model.precision=float32, or restore the model's files"
            )
        parts.append((drawn * 255).round().astype(np.uint8))
    return np.concatenate(parts) if parts else np.zeros((0, 1, 1, 3), np.uint8)


def _batches(images: Sequence[Drawn], size: int) -> Iterator[list[Drawn]]:
    """Consecutive images of one guidance scale, at most `size` at a time: a call takes one scale."""
    batch: list[Drawn] = []
    for image in images:
        if batch and (len(batch) == size or image.guidance != batch[0].guidance):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
