"""The supported architectures: load a stock pipeline, and get the `Family` that knows its ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from esd.errors import UserError

from .base import Conditioning, Denoiser, Family
from .mmdit import Flux, Flux2Klein, StableDiffusion3
from .pipeline import PipelineFamily
from .unet import StableDiffusion, StableDiffusionXL

__all__ = [
    "Conditioning",
    "Denoiser",
    "Family",
    "Flux",
    "Flux2Klein",
    "PipelineFamily",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "check_model",
    "family_of",
    "load_pipeline",
]

_FAMILIES: dict[str, type[Any]] = {  # of PipelineFamily
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2Klein,
}


def check_model(path: str | Path, *, setting: str = "model.path") -> None:
    """Refuses at once, without loading or network, a local base that does not exist or is no pipeline.

    A name like "org/model" that is nothing here is taken for a hub id and passes.

    Args:
        path: of the base.
        setting: what the user gave it as, for messages.

    Raises:
        UserError: see above.
    """
    local = Path(path).expanduser()
    if local.exists():
        if not (local / "model_index.json").is_file():
            raise UserError(
                f"{setting} is {str(path)!r}, which holds no model_index.json; give the "
                "directory of a diffusers pipeline or a hub id"
            )
        return
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~") or Path(parts[0]).is_dir():
        raise UserError(
            f"{setting} is {str(path)!r}, which does not exist; give the directory of a diffusers "
            "pipeline or a hub id such as 'CompVis/stable-diffusion-v1-4'"
        )


def load_pipeline(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    *,
    setting: str = "model.path",
) -> Any:
    """The stock diffusers pipeline at a local directory or hub id, on the CPU, without its safety checker, progress
    bar off.

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        path: directory that holds model_index.json, or "org/model".
        dtype: floating-point type of the weights.
        revision: commit of the hub repository; pin one for work to be repeated.
        setting: what the user gave the path as, for messages.

    Raises:
        UserError: nothing there, not a pipeline, not a supported one, one that lacks a part or has a broken one, or no
            safetensors weights.
    """
    check_model(path, setting=setting)
    try:
        index = DiffusionPipeline.load_config(str(path), revision=revision)
        _check_supported(index.get("_class_name"), f"{setting} is {str(path)!r}, in which ")
        without = _left_out(path, index, setting)
        pipe = DiffusionPipeline.from_pretrained(
            str(path), dtype=dtype, revision=revision, use_safetensors=True, **without
        )
    except (OSError, SafetensorError, RuntimeError) as error:  # transformers raises the last for odd or missing sizes
        reason = str(error).strip().splitlines()[0].removesuffix(".")
        mend = "get the whole model again"
        if not Path(path).exists():  # the hub says of a gated model that there is none
            mend = (
                "for a gated model accept its licence on huggingface.co and log in with `hf auth login`, without a "
                f"network set {setting} to the folder of a copy"
            )
        raise UserError(
            f"{setting} is {str(path)!r}, which could not be loaded as a pipeline: {reason}; {mend}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_of(pipe: Any, device: torch.device | str | None = None) -> Family:
    """The family of a stock diffusers pipeline.

    Args:
        pipe: the pipeline, its parts wherever they are.
        device: where to work; None for where the denoiser is.

    Raises:
        UserError: an unsupported pipeline.
    """
    _check_supported(type(pipe).__name__)
    family: Family = _FAMILIES[type(pipe).__name__](pipe)
    if device is not None:
        family.device = torch.device(device)
    return family


def _left_out(path: str | Path, index: Mapping[str, Any], setting: str) -> dict[str, None]:
    """The parts of a pipeline that are not loaded: its safety checker, and what it may lack and does.

    Args:
        path: of the pipeline.
        index: its model_index.json.
        setting: what the user gave the path as, for messages.

    Raises:
        UserError: it lacks a part that it cannot do without, or the folder of one.
    """
    name, folder = index["_class_name"], Path(path)
    parts: Mapping[str, bool] = _FAMILIES[name].parts()
    missing = [part for part in parts if (index.get(part) or [None])[0] is None]
    lost = [part for part in parts if part not in missing and folder.is_dir() and not (folder / part).is_dir()]
    if odd := [*(part for part in missing if not parts[part]), *lost]:
        raise UserError(f"{setting} is {str(path)!r}, a {name} without its {odd[0]}; get the whole model again")
    return dict.fromkeys(missing) | ({"safety_checker": None} if "safety_checker" in index else {})


def _check_supported(name: object, where: str = "") -> None:
    """Raises UserError for what is no supported pipeline; `where` goes before, up to "the pipeline is"."""
    allowed = f"supported: {', '.join(_FAMILIES)}"
    if name is None:
        raise UserError(f"{where}model_index.json names no pipeline; get the whole model again; {allowed}")
    if name not in _FAMILIES:
        raise UserError(f"{where}the pipeline is a {name}; {allowed}")
