"""What it costs to keep maps of all cross-attention while sampling, on the bundled model.

    python scripts/benchmarks/attention_capture.py
    python scripts/benchmarks/attention_capture.py --images 8 --steps 50 --rounds 5

Both draw with `esd.interventions.sample`: the same prompts, seeds and steps, once plain and once under
`AttentionMaps`, which keeps the mean over heads and places of every step. They take turns, so that whatever else the
machine does falls on both, and the ratio is that of their best rounds. Also says whether the latents are the same, bit
for bit. The last line is JSON. Exit code 1 where latents differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from esd.config.common import ModelConfig
from esd.families import Family
from esd.interventions import AttentionMaps, sample
from esd.model import check, find_device, load

PROMPTS = ("a cat and a rose", "a dog and a pizza", "an owl and a rocket", "a horse and a tree")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelConfig().path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--where", default="cross")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    check(ModelConfig(args.model))
    family = load(ModelConfig(args.model), find_device(args.device))
    family.place("encoders", "denoiser")
    result = measure(family, args)
    print(json.dumps(result))
    if not result["pictures_identical"]:
        sys.exit(1)


def measure(family: Family, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both in turns; the figures of the last line."""
    prompts, seeds = [PROMPTS[i % len(PROMPTS)] for i in range(args.images)], list(range(args.images))
    maps = AttentionMaps(args.where)

    def seconds(*ops: AttentionMaps, steps: int = args.steps) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        drawn = sample(family, prompts, seeds, *ops, num_steps=steps, guidance_scale=args.guidance).latents.cpu()
        return time.perf_counter() - start, drawn

    for ops in ((), (maps,)):  # the first call of a shape allocates and plans
        seconds(*ops, steps=1)
    plain, captured, identical = list[float](), list[float](), True
    for number in range(args.rounds):
        (first, without), (second, under) = seconds(), seconds(maps)
        plain, captured = [*plain, first], [*captured, second]
        identical = identical and torch.equal(without, under)
        print(f"round {number + 1}: {first:.2f} s plain, {second:.2f} s with maps", flush=True)
    return {
        "device": family.device.type,
        "threads": torch.get_num_threads(),
        "where": args.where,
        "places": len(maps.sites(family)),
        "images": args.images,
        "steps": args.steps,
        "seconds_plain": min(plain),
        "seconds_with_maps": min(captured),
        "ratio": min(captured) / min(plain),
        "ratio_by_round": [under / without for without, under in zip(plain, captured, strict=True)],
        "maps_gib": maps.maps.gib,
        "pictures_identical": identical,
    }


if __name__ == "__main__":
    main()
