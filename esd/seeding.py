"""Random draws that can be replayed: a generator is a function of (seed, purpose, step, index) and of
nothing else.

So a resumed run needs no saved generator state, two processes draw what one would (the index counts samples
over all of them), and no sample depends on the batch it sits in. The tuple is hashed with BLAKE2, not with
Python's `hash`, which changes from process to process.

Source: the habit is EDM2's (training_loop.py reseeds from the step); keying by sample is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def derive(seed: int, purpose: str, step: int = 0, index: int = 0) -> int:
    """A 63-bit seed for this purpose, step and sample; unlike inputs give unrelated seeds."""
    key = f"{int(seed)}/{purpose}/{int(step)}/{int(index)}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def generator(
    seed: int, purpose: str, step: int = 0, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator for this purpose, step and sample; the caller owns it.

    Args:
        seed: the run's seed.
        purpose: what is drawn ("noise", "time", ...), so that two draws of one step are independent.
        step: update number.
        index: sample number within the update, counted over all processes.
        device: where it draws; a CPU draw is the same on every machine, so keep the default unless it is too
            slow.
    """
    return torch.Generator(device=device).manual_seed(derive(seed, purpose, step, index))


def generators(seed: int, purpose: str, step: int, indices: Iterable[int]) -> list[torch.Generator]:
    """One fresh CPU generator per sample index."""
    return [generator(seed, purpose, step, index) for index in indices]


def normal(sources: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal float32 (len(sources), *shape) on the CPU, row i drawn from source i alone."""
    return torch.stack([torch.randn(tuple(shape), generator=source) for source in sources])


def below(source: torch.Generator, high: int) -> int:
    """One integer, uniform in [0, high)."""
    return int(torch.randint(high, (), generator=source))
