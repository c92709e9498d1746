"""Pictures as bytes: what is saved, judged and compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Family

BATCH = 16  # pictures that are decoded at once


def as_uint8(images: Tensor) -> np.ndarray:
    """uint8 RGB (n, H, W, 3) of pictures (n, 3, H, W) in [0, 1]."""
    return (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)


def images_of(family: Family, latents: Tensor, batch_size: int = BATCH) -> np.ndarray:
    """uint8 RGB (n, H, W, 3) of clean latents (n, c, h, w).

    Args:
        family: of the model that drew them.
        latents: of n pictures.
        batch_size: how many are decoded at once.

    Raises:
        UserError: values that are not finite, which 8 bits would show as black.
    """
    images = torch.cat([family.decode(part).cpu() for part in latents.split(batch_size)])
    if not images.isfinite().all():
        raise UserError(f"a picture is not finite, in {family.dtype}; set model.precision=float32")
    return as_uint8(images)
