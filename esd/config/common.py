"""What every program takes: a base, a device, a seed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from esd.config.options import option
from esd.errors import UserError

MAX_SEED = 2**63 - 1  # torch's generators take no more


@dataclass
class ModelConfig:
    """The base."""

    path: str = option("checkpoints/emoji-sd", "a diffusers folder, or a name on the Hugging Face hub")
    revision: str | None = option(None, "commit of a hub model; pin one to know what you erased from")
    precision: str = option(
        "float32",
        "of the frozen weights; the trained ones are float32, unless weights.masters=false",
        one_of=("float32", "bfloat16", "float16"),
    )


def check_device(device: str) -> None:
    """Raises UserError for what is no name of a device; whether the machine has it, torch says later."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"device={device}: allowed: auto, cpu, mps, cuda, or one card such as cuda:1")
