"""Erased Stable Diffusion: remove a concept from a text-to-image model, measure what went and what stayed.

`import esd` loads nothing heavy; `esd.apply`, `esd.remove` and `esd.erased` bring torch in when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "erased", "remove"]

if TYPE_CHECKING:
    from .checkpoint import apply, erased, remove


def __getattr__(name: str) -> Any:
    if name in ("apply", "erased", "remove"):
        from . import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'esd' has no attribute {name!r}")
