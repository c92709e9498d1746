"""How a program was launched: as how many processes; a training also on which device and in which precision."""

from __future__ import annotations

import os
from typing import Any

from esd.config.train import TrainConfig
from esd.errors import UserError
from esd.model import find_device


def processes() -> int:
    """Of this launch, by accelerate or torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def elsewhere(config: TrainConfig) -> bool:
    """Whether this is a plan for a card that need not be here, so that nothing works on a device."""
    return config.plan_only and config.device_memory is not None


def check_launch(asked: int | None) -> None:
    """Refuses, before anything is loaded, a launch that is not the one this run was made for.

    Args:
        asked: number of processes, or None for as many as there are.

    Raises:
        UserError: another number of processes, or a launch that would cut the model up.
    """
    there = processes()
    if asked is not None and asked != there:
        # without cards accelerate starts one process, whatever number it is told
        several = f"accelerate launch --num_processes {asked} -m esd.train ... where there are as many cards, else as "
        several += f"torchrun --nproc_per_node {asked} -m esd.train ..."
        raise UserError(
            f"training.processes={asked}, and this launch has {there}; start it as "
            f"{several if asked > 1 else 'python -m esd.train ...'}, or set training.processes={there}"
        )
    for kind, name in {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}.items():
        if os.environ.get(kind, "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate was configured for {name}, which cuts weights into pieces that student and teacher cannot "
                "share; launch without it, one whole model to a card (accelerate launch --num_processes 2 -m esd.train "
                "...), and where a card is too small set weights=lora weights.frozen=float8 with "
                "training.gradient_checkpointing=true"
            )


def make_accelerator(config: TrainConfig, tracker: dict[str, Any]) -> Any:
    """The Accelerator for a device and a precision.

    Raises:
        UserError: the machine has no such device, or it is asked for fp16 or float8 and knows none.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # jobs of a sweep may differ in device and precision
    if elsewhere(config):
        return Accelerator(mixed_precision="no", cpu=True, **tracker)
    kind, mixed = find_device(config.device), mixed_precision(config, launched())
    if mixed == "fp16" and not kind.startswith("cuda"):
        settings = {
            "model.precision": config.model.precision,
            "training.mixed_precision": config.training.mixed_precision,
        }
        told = " ".join(f"{name}={value}" for name, value in settings.items() if value in ("float16", "fp16"))
        raise UserError(
            f"{told or 'accelerate launch --mixed_precision fp16'} on {kind}: gradients in fp16 are scaled on CUDA "
            "cards only; allowed here: bf16 with model.precision=bfloat16, or no with model.precision=float32; "
            "plan_only=true device_memory=24 plans it for a card of 24 GB"
        )
    if config.weights.frozen and kind == "mps":
        raise UserError(
            f"weights.frozen={config.weights.frozen} on mps, which knows no float8; leave it out, or set device=cpu"
        )
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)
    return Accelerator(mixed_precision=mixed, cpu=config.device == "cpu", **tracker)


def launched() -> str:
    """The autocast that `accelerate launch` was told."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def mixed_precision(config: TrainConfig, launched: str) -> str:
    """The autocast of a run; `auto` is that of a narrow base, else what `accelerate launch` was told.

    Raises:
        UserError: the launcher was told something other than no, bf16 or fp16, and the settings do not say.
    """
    if not config.weights.masters:  # the whole model is of one precision
        return "no"
    if config.training.mixed_precision != "auto":
        return config.training.mixed_precision
    if launched not in ("no", "bf16", "fp16"):
        raise UserError(
            f"accelerate launch --mixed_precision {launched}: allowed: no, bf16, fp16; or training.mixed_precision=no "
            "here"
        )
    return {"bfloat16": "bf16", "float16": "fp16"}.get(config.model.precision, launched)
