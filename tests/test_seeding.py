from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from esd import seeding


def test_a_generator_is_a_function_of_its_key() -> None:
    again = [torch.randn(3, generator=seeding.generator(7, "noise", 2, 5)) for _ in range(2)]
    assert torch.equal(*again)


def test_every_part_of_the_key_matters() -> None:
    keys = [(7, "noise", 2, 5), (8, "noise", 2, 5), (7, "time", 2, 5), (7, "noise", 3, 5), (7, "noise", 2, 6)]
    keys += [(7, "noise", 5, 2), (72, "noise", 5), (7, "noise", 25)]
    assert len({seeding.derive(*key) for key in keys}) == len(keys)


def test_seeds_do_not_depend_on_the_process() -> None:
    code = "from esd.seeding import derive; print(derive(1, 'noise', 2, 3))"
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            text=True,
        )
        for seed in ("1", "2")
    }
    assert outputs == {f"{seeding.derive(1, 'noise', 2, 3)}\n"}


def test_a_sample_does_not_depend_on_its_batch() -> None:
    whole = seeding.normal(seeding.generators(3, "noise", 0, range(6)), (4, 5, 7))
    part = seeding.normal(seeding.generators(3, "noise", 0, [4, 2]), (4, 5, 7))
    assert whole.shape == (6, 4, 5, 7)
    assert torch.equal(part, whole[[4, 2]])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    seeding.normal(seeding.generators(3, "noise", 0, range(2)), (4,))
    seeding.below(seeding.generator(1, "time"), 10)
    assert torch.equal(torch.randn(2), expected)


def test_below_reaches_every_value_evenly() -> None:
    counts = torch.zeros(5)
    for step in range(2000):
        counts[seeding.below(seeding.generator(0, "time", step), 5)] += 1
    assert (counts - 400).abs().max() < 80
