"""Images from a stock pipeline, one CPU generator per image, so that no image depends on its neighbours.

An image is decided by prompt, seed, guidance, size and weights, not by batch size, order, process or what was drawn
before (up to rounding, which a batch may change in the last bit). Files are written atomically and existing ones
are kept, so the same call after an interruption draws only what is missing.

Several processes share one folder: each draws every n-th image, and the first of them writes the manifest. Images of
the base, which every erased model is measured against, may be kept in a folder of their own: a file there is named by
the hash of all that decides the picture, so it is found again by what it is, and never for another.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from esd.checkpoint import fingerprint
from esd.errors import UserError
from esd.evaluation.identity import digest, pipeline_hashes
from esd.evaluation.prompts import PromptRow
from esd.families import Family
from esd.progress import bar
from esd.storage import atomic, write_json

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's, of a broken file
STOCK_MULTIPLE = 8  # of pixels: stock pipelines take no other sizes, whatever their autoencoder


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
    height: int | None = None  # pixels; None is the model's own
    width: int | None = None


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
        cut: prompts that are too long for the text encoder, each with the end that it does not read.
        drawn_with: versions and device, of each sitting that drew here; one for all that had the same.
        interventions: what was done to the model while it drew, as `esd.interventions.written` reads it.
    """

    folder: Path
    base: Mapping[str, str | None]
    checkpoint: str | None
    sha256: str | None
    num_steps: int
    images: tuple[Drawn, ...]
    cut: Mapping[str, str] = field(default_factory=dict)
    drawn_with: tuple[Mapping[str, str], ...] = ()
    interventions: tuple[str, ...] = ()

    def save(self) -> None:
        """Writes folder/manifest.json."""
        told = {
            "base": self.base,
            "checkpoint": self.checkpoint,
            "sha256": self.sha256,
            "num_steps": self.num_steps,
            "drawn_with": self.drawn_with,
            "cut": self.cut,
            "interventions": self.interventions,
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
                told.get("cut", {}),
                tuple(told.get("drawn_with", ())),
                tuple(told.get("interventions", ())),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} holds no manifest.json of images ({error}); draw them with esd.generate"
            ) from error


@dataclass(frozen=True)
class Share:
    """Which images a process draws: those whose number leaves `index` when divided by `count`.

    Attributes:
        index: of the process; 0 also writes the manifest.
        count: of the processes.
        wait: returns once every process has called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


def base_of(family: Family) -> dict[str, str | None]:
    """What identifies a base and its images: a name, a commit on the hub, and hashes.

    "fingerprint" is of 32 values of each parameter, as programs that only compare runs know it; the hashes of
    `esd.evaluation.identity` see more: one row of an embedding, a configuration, a tokenizer.
    """
    pipe = family.pipe
    parts = {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, nn.Module)}
    values = {name: fingerprint(dict(part.named_parameters())) for name, part in parts.items()}
    return {
        "name": family.base_name,
        "revision": family.base_revision,
        "fingerprint": digest(values),
        **pipeline_hashes(pipe),
    }


def prints(base: Mapping[str, str | None]) -> dict[str, str | None]:
    """Of what `base_of` says, what decides a picture: where the base was taken from does not."""
    return {name: value for name, value in base.items() if name not in ("name", "revision")}


def check_sizes(family: Family, rows: Sequence[PromptRow]) -> None:
    """Raises UserError for the first row whose height or width the model's pipeline cannot draw."""
    for row in rows:
        for name, edge in (("height", row.height), ("width", row.width)):
            try:
                family.latent_shape(edge)
                if (edge or 0) % STOCK_MULTIPLE:
                    raise UserError(f": allowed: multiples of {STOCK_MULTIPLE} pixels")
            except UserError as error:
                allowed = str(error).partition(": ")[2]
                raise UserError(f"case_number {row.case_number}: {name}={edge}: {allowed}") from error


def plan(
    rows: Sequence[PromptRow],
    out_dir: Path,
    *,
    base: Mapping[str, str | None],
    num_steps: int,
    guidance_scale: float,
    images_per_prompt: int = 1,
    checkpoint: Path | None = None,
    cut: Mapping[str, str] | None = None,
    drawn_with: Mapping[str, str] | None = None,
    interventions: Sequence[str] = (),
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
        cut: see `Manifest`; what `Family.cut` says of the prompts.
        drawn_with: the versions and the device of this sitting.
        interventions: see `Manifest`.

    Raises:
        UserError: the folder holds images of another base, other weights, steps, interventions, prompts, seeds,
            guidance or size.
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
            row.height,
            row.width,
        )
        for row in rows
        for sample in range(images_per_prompt)
    )
    sha256 = None if checkpoint is None else hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    name = None if checkpoint is None else str(checkpoint)
    sitting = (dict(drawn_with),) if drawn_with else ()
    planned = Manifest(out_dir, base, name, sha256, num_steps, images, cut or {}, sitting, tuple(interventions))
    if (out_dir / "manifest.json").exists():
        _refuse_others(Manifest.load(out_dir), planned)
    return planned


def generate(
    pipe: Any, planned: Manifest, *, batch_size: int, share: Share | None = None, kept: Path | None = None
) -> Manifest:
    """Draws what is planned, and writes the manifest first, so that it vouches for every image in the folder.

    Args:
        pipe: a stock text-to-image pipeline, with erased weights already applied if there are any.
        planned: from `plan`; its folder is made if need be, and images that its manifest lists are kept.
        batch_size: images per call.
        share: of this process; None for the only one.
        kept: a folder in which images of the base are looked for, and left for the next time; None keeps none. Images
            of erased weights are never looked for there.

    Returns:
        The manifest of what was planned, once all processes are through. The one that is written also lists images that
        were drawn here before and are not asked for now.
    """
    out_dir, share = planned.folder, share or Share()
    known = Manifest.load(out_dir) if (out_dir / "manifest.json").exists() else None
    share.wait()  # all have looked before the first one writes
    missing = [image for image in planned.images if not known or not (out_dir / image.file).exists()]
    earlier = known.drawn_with if known else ()
    sittings = (*earlier, *(sitting for sitting in planned.drawn_with if missing and sitting not in earlier))
    written = replace(planned, drawn_with=sittings)
    if share.index == 0:
        listed = {image.file for image in known.images} if known else set()
        for image in planned.images:
            if image.file not in listed:  # left by who knows what
                (out_dir / image.file).unlink(missing_ok=True)
        (_beside(written, known) if known else written).save()
    share.wait()
    mine = [image for image in planned.images[share.index :: share.count] if not (out_dir / image.file).exists()]
    kept = kept if planned.checkpoint is None else None
    todo = [image for image in mine if not _found(planned, image, kept)]
    what = "erased images" if planned.checkpoint else "base images"
    with bar(what, len(todo), unit="image", shown=bool(todo) and share.index == 0) as progress:
        for batch in _batches(todo, batch_size):
            arrays = sample(
                pipe,
                [i.prompt for i in batch],
                [i.seed for i in batch],
                num_steps=planned.num_steps,
                guidance_scale=batch[0].guidance,
                batch_size=batch_size,
                height=batch[0].height,
                width=batch[0].width,
            )
            for image, array in zip(batch, arrays, strict=True):
                with atomic(out_dir / image.file) as staged:
                    Image.fromarray(array).save(staged, format="PNG")
                if kept:
                    _copy(out_dir / image.file, kept / _kept_name(planned, image))
            progress.update(len(batch))
    share.wait()
    return written


def to_draw(planned: Manifest, kept: Path | None) -> int:
    """How many of the planned images are neither there nor, of a base's, among those kept."""
    absent = [image for image in planned.images if not (planned.folder / image.file).exists()]
    if kept is None or planned.checkpoint:
        return len(absent)
    return sum(not (kept / _kept_name(planned, image)).exists() for image in absent)


def _beside(written: Manifest, known: Manifest) -> Manifest:
    """The manifest of all images of a folder: those planned, and those drawn before that are not asked for now."""
    files = {image.file for image in written.images}
    others = tuple(i for i in known.images if i.file not in files and (known.folder / i.file).exists())
    cut = {i.prompt: known.cut[i.prompt] for i in others if i.prompt in known.cut}
    return replace(written, images=written.images + others, cut={**written.cut, **cut})


def _kept_name(planned: Manifest, image: Drawn) -> str:
    """The name under which an image of the base is kept: a hash of all that decides it."""
    facts = {**asdict(image), "base": planned.base, "num_steps": planned.num_steps, "drawn_with": planned.drawn_with}
    facts |= {"interventions": planned.interventions} if planned.interventions else {}  # else as it always was
    for name in ("file", "case_number", "sample", "labels"):  # what the image is called, not what it shows
        del facts[name]
    return f"{digest(facts)}.png"


def _found(planned: Manifest, image: Drawn, kept: Path | None) -> bool:
    """Whether an image was kept and is now in the folder of the manifest; a damaged one counts as not kept."""
    if kept is None:
        return False
    source = kept / _kept_name(planned, image)
    try:
        with Image.open(source) as opened:
            opened.load()
    except UNREADABLE:
        return False
    _copy(source, planned.folder / image.file)
    return True


def _copy(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all; a link would let a change to one change the other."""
    with atomic(target) as staged:
        shutil.copyfile(source, staged)


def _refuse_others(here: Manifest, now: Manifest) -> None:
    """Raises UserError where the images of a manifest are not those that are asked for now."""
    if unknown := [name for name in now.base if name not in here.base]:
        raise UserError(
            f"{now.folder} holds images drawn before manifests told the base's {' and '.join(unknown)}, so that "
            "nothing says whether they are of this base; choose another run_dir, or remove that folder"
        )
    facts = [
        *((f"the base's {name}", here.base[name], value) for name, value in prints(now.base).items()),
        ("the checkpoint's sha256", (here.sha256 or "none")[:12], (now.sha256 or "none")[:12]),
        ("num_steps", here.num_steps, now.num_steps),
        ("interventions", list(here.interventions), list(now.interventions)),
    ]
    known = {image.file: image for image in here.images}
    for image in now.images:
        if old := known.get(image.file):
            facts += [
                (f"{image.file}: {name}", getattr(old, name), getattr(image, name))
                for name in ("prompt", "seed", "guidance", "height", "width")
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
    height: int | None = None,
    width: int | None = None,
    what: str | None = None,
) -> np.ndarray:
    """uint8 images (n, H, W, 3) of n prompts, image i drawn from a CPU generator seeded with seeds[i].

    Args:
        pipe: a stock pipeline; its progress bar is switched off.
        prompts: n texts.
        seeds: n seeds.
        num_steps: sampling steps.
        guidance_scale: classifier-free guidance; 1 or less means none.
        batch_size: images per call.
        height, width: in pixels; None is the pipeline's own.
        what: a progress bar calls them; None shows none.

    Raises:
        UserError: the pipeline draws values that are not finite.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
    pipe.set_progress_bar_config(disable=True)
    parts = []
    with bar(what or "", len(prompts), unit="image", shown=what is not None) as progress:
        for start in range(0, len(prompts), batch_size):
            now = slice(start, start + batch_size)
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[now]]
            drawn = np.asarray(
                pipe(
                    prompt=list(prompts[now]),
                    num_inference_steps=num_steps,
                    guidance_scale=guidance_scale,
                    height=height,
                    width=width,
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
            progress.update(len(parts[-1]))
    return np.concatenate(parts) if parts else np.zeros((0, 1, 1, 3), np.uint8)


def _batches(images: Sequence[Drawn], size: int) -> Iterator[list[Drawn]]:
    """Images that one call can draw, of one guidance scale and one size, at most `size` at a time."""
    alike: dict[tuple[Any, ...], list[Drawn]] = {}
    for image in images:
        alike.setdefault((image.guidance, image.height, image.width), []).append(image)
    for group in alike.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
