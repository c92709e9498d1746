"""What a denoiser makes of a picture inside; `extract` takes representations out, `study` says what is in them."""

from .extract import (
    Generated,
    Representations,
    as_pixels,
    channel_levels,
    check_time,
    concat,
    generate,
    img2repr,
    similarity,
    site_of,
    spread,
)
from .study import analyse

__all__ = [
    "Generated", "Representations", "analyse", "as_pixels", "channel_levels", "check_time", "concat", "generate",
    "img2repr", "similarity", "site_of", "spread",
]  # fmt: skip
