"""Images per second in batches against one prompt at a time, on the bundled model: the same prompts, seeds and dtype.

    python scripts/benchmarks/generate_speed.py
    python scripts/benchmarks/generate_speed.py --dtype bfloat16 --images 32 --batch 32 --rounds 3

Both draw with stock diffusers and one generator per image; no image is kept or found again. They take turns, so that
whatever else the machine does falls on both, and the ratio is that of their best rounds. Also says whether the initial
noise is the same, bit for bit, and how far pixels are apart (of 255): in float32 at most 1, which is rounding.
The last line is JSON. Exit code 1 where --least is given and the ratio falls short of it, or images differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from esd.config.common import ModelConfig
from esd.evaluation.generate import sample
from esd.evaluation.prompts import fill
from esd.evaluation.vocabulary import Vocabulary
from esd.model import check, find_device, load

TEMPLATE = "a drawing of a {thing} in the {style} style"


def prompts_of(model: str, n: int) -> list[str]:
    """n prompts in the model's own words, as different as there are so many; one everyday prompt where it has none."""
    vocabulary = Vocabulary.load(model)
    if vocabulary is None:
        return ["a photo of a dog"] * n
    filled = [prompt for prompt, _ in fill(TEMPLATE, vocabulary.names("thing"), vocabulary.names("style"))]
    return [filled[i * len(filled) // n % len(filled)] for i in range(n)]


def timed(task: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds that a task took, and what it drew."""
    start = time.perf_counter()
    images = task()
    return time.perf_counter() - start, images


def first_noise(pipe: Any, prompts: list[str], seeds: list[int], batch: int) -> torch.Tensor:
    """What the pipeline starts from, as it hands it to its denoiser in the first step."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].detach().clone())

    hook = pipe.unet.register_forward_pre_hook(keep)
    try:
        sample(pipe, prompts, seeds, num_steps=1, guidance_scale=1.0, batch_size=batch)
    finally:
        hook.remove()
    return torch.cat(seen)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelConfig().path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least", type=float, default=None, help="smallest ratio that passes")
    args = parser.parse_args(arguments)
    check(ModelConfig(args.model))
    family = load(ModelConfig(args.model, precision=args.dtype), find_device(args.device))
    with family.drawing() as pipe:
        result = measure(pipe, args)
    print(json.dumps(result))
    failed = not result["noise_identical"] or (args.dtype == "float32" and result["largest_pixel_difference"] > 1)
    if failed or (args.least and result["ratio"] < args.least):
        sys.exit(1)


def measure(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both in turns; the figures of the last line."""
    prompts, seeds = prompts_of(args.model, args.images), list(range(args.images))

    def drawn(batch: int, n: int = args.images) -> np.ndarray:
        return sample(
            pipe, prompts[:n], seeds[:n], num_steps=args.steps, guidance_scale=args.guidance, batch_size=batch
        )

    for batch in (1, args.batch):  # the first call of a shape allocates and plans
        drawn(batch, min(batch, args.images))
    seconds: dict[int, list[float]] = {1: [], args.batch: []}
    images = {}
    for number in range(args.rounds):
        for batch in (1, args.batch):
            took, images[batch] = timed(lambda batch=batch: drawn(batch))
            seconds[batch].append(took)
            print(f"round {number + 1}, batches of {batch}: {args.images / took:.2f} images/s", flush=True)
    noises = [first_noise(pipe, prompts, seeds, batch) for batch in (1, args.batch)]
    apart = np.abs(images[1].astype(int) - images[args.batch])
    return {
        "dtype": args.dtype,
        "device": pipe.device.type,
        "threads": torch.get_num_threads(),
        "images": args.images,
        "batch": args.batch,
        "steps": args.steps,
        "images_per_s_alone": args.images / min(seconds[1]),
        "images_per_s_batched": args.images / min(seconds[args.batch]),
        "ratio": min(seconds[1]) / min(seconds[args.batch]),
        "ratio_by_round": [one / many for one, many in zip(seconds[1], seconds[args.batch], strict=True)],
        "noise_identical": bool(torch.equal(*noises)),
        "largest_pixel_difference": int(apart.max()),
        "share_of_pixels_beyond_1": float((apart > 1).mean()),
    }


if __name__ == "__main__":
    main()
