"""How the tests train tiny models unless they say otherwise: each takes what it is about and changes that.

And what a training left, to be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from esd.objectives import Objective
from esd.plan import TrainPlan
from esd.sources import Sampling

SAMPLING = Sampling(
    num_steps=3, guidance_scale=3.0, time_rule="visited", scheduler=None, max_batch=64, size=None, negative=None,
    scaled_input=True,
)  # fmt: skip
PLAN = TrainPlan(
    concepts=("cat",),
    prompts=("cat", "a cat"),
    erase_from=(),
    preserve=(),
    preserve_weight=1.0,
    selection="cross.k + cross.v",
    lora=None,
    frozen=None,
    masters=True,
    objective=Objective(),
    sampling=SAMPLING,
    sampler="teacher",
    staleness=None,
    sample_with="erase_from",
    rollouts=3,
    reuse=2,
    updates=4,
    batch_size=3,
    gradient_accumulation=1,
    lr=1e-3,
    lr_schedule="constant",
    warmup=0,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    clip_norm=1.0,
    optimizer="adam",
    gradient_checkpointing=False,
    compile=False,
    save_every=0,
    seed=0,
)


def metrics(folder: Path) -> list[dict[str, float]]:
    """What a training logged, update for update."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two trainings left the same differences, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
