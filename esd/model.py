"""The base that `config.model` names: looked at before anything is loaded, then loaded; its parts come to a device
when they are needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd.config.common import ModelConfig
from esd.errors import UserError

if TYPE_CHECKING:
    from esd.families import Family


def check(model: ModelConfig) -> None:
    """Refuses, without loading or network, a base that cannot be had.

    Raises:
        UserError: the bundled model outside a clone, a folder that is no pipeline or has no revisions, no such folder.
    """
    from esd.families import check_model

    here = Path(model.path).exists()
    if model.path == ModelConfig().path and not here:  # its name would pass for one on the hub
        raise UserError(
            f"model.path={model.path} comes with a clone of esd and is not in this folder; run esd in the clone, or "
            "give model.path, a diffusers folder or a name on the hub such as CompVis/stable-diffusion-v1-4"
        )
    if model.revision and here:
        raise UserError(
            f"model.revision={model.revision} with model.path={model.path}, which is a folder here: only a model on "
            "the hub has revisions; leave model.revision out"
        )
    check_model(model.path)


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


def load(model: ModelConfig, device: Any) -> Family:
    """The family of the base, which works on a device and lies on the CPU till then.

    Raises:
        UserError: see `esd.families.load_pipeline`.
    """
    import diffusers
    import torch
    import transformers

    from esd.families import family_of, load_pipeline

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # loading takes a second; training has a bar of its own
    return family_of(load_pipeline(model.path, getattr(torch, model.precision), model.revision), device)
