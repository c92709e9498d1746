"""The benchmarks run, and the loops they compare do the same work."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from esd.errors import UserError
from esd.families import Family
from esd.learner import loss_terms
from esd.objectives import Objective
from esd.sources import Conditions, Points
from esd.trajectory import rollout


def benchmark(name: str) -> ModuleType:
    """A script of scripts/benchmarks, as a module."""
    path = Path(__file__).resolve().parents[1] / f"scripts/benchmarks/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    """scripts/benchmarks/train_speed.py."""
    return benchmark("train_speed")


@pytest.mark.parametrize("sampler", ["teacher", "student"])
@pytest.mark.parametrize("stop", [0, 3])
def test_the_plain_loop_samples_and_learns_what_we_do(
    speed: ModuleType, tiny_family: Family, stop: int, sampler: str
) -> None:
    work = speed.Work(selection="esd_x", batch=3, steps=5)
    names = tiny_family.select("esd_x").names
    plain = speed.Plain(tiny_family.pipe, copy.deepcopy(tiny_family.denoiser), names, work, sampler, 0)
    for parameter in plain.student.parameters():
        parameter.data *= 1.2 if parameter.requires_grad else 1
    noise = plain.noise()
    x, t = plain.sample(noise, stop)
    cond, null = tiny_family.encode([work.prompt]), tiny_family.encode([""])
    rows = [0] * 3
    path = rollout(
        tiny_family, plain.sampler, noise, cond[rows], null, num_steps=5, guidance_scale=3.0, stop=stop, keep="last"
    )
    torch.testing.assert_close(x, path.inputs[0], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        said = [tiny_family.predict(tiny_family.denoiser, x, t, c[rows]) for c in (cond, null)]
    points = Points(x, t.expand(3), torch.zeros(3, dtype=torch.int64), *said)
    source: Any = type("Source", (), {"conditions": Conditions(cond, null)})
    ours = loss_terms(tiny_family, Objective(eta=work.eta), plain.student, points, source, None, None)[0]
    torch.testing.assert_close(plain.loss(x, t), ours, atol=1e-5, rtol=1e-4)
    assert ours > 0
    before = [parameter.detach().clone() for parameter in plain.student.parameters()]
    plain.update(stop)
    moved = {
        name
        for (name, now), then in zip(plain.student.named_parameters(), before, strict=True)
        if not torch.equal(now, then)
    }
    assert moved == set(names)
    assert all(map(torch.equal, plain.teacher.parameters(), tiny_family.denoiser.parameters()))


def test_it_runs_from_end_to_end_and_ends_in_json(
    speed: ModuleType, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--selection cross.k --batch 2 --steps 3 --rollouts 2 --student-rollouts 3 --rounds 1 --least 1"
    knobs = "--reuse 2 8 --staleness 1 2 --parts speed"
    speed.main(["--model", str(tiny_model_dir), *small.split(), *knobs.split()])
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert told["frozen_ratio"] > 0 and told["student_ratio"] > 0
    assert told["memory_ratio"] is None and told["seconds_to_erase"] is None
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 + 2 + 2 + 1  # head, plain loops, banks, on policy, the student's bank
    assert len({len(row) for row in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parts", "speed", "rates"], "ships no vocabulary.json"),
        (["--parts", "speed", "--model", "nowhere"], "'nowhere', which does not exist"),
        (["--parts", "speed", "--selection", "attn3"], "nearest: attn1, attn2"),
    ],
)
def test_what_cannot_be_measured_is_told_at_once(
    speed: ModuleType, tiny_model_dir: Path, arguments: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        speed.main(["--model", str(tiny_model_dir), *arguments])


def test_a_bank_is_timed_over_whole_lives(speed: ModuleType, tiny_family: Family) -> None:
    work = speed.Work(selection="cross.k", batch=2, steps=3)
    bank, short = (speed.Variant("", who, rollouts=2, reuse=2, staleness=age) for who, age in
                   (("teacher", None), ("student", 4)))  # fmt: skip
    assert [speed.lifetime(tiny_family, work, bank, least) for least in (1, 6, 7)] == [6, 6, 12]
    assert speed.lifetime(tiny_family, work, short, 1) == 4


def test_the_last_line_takes_the_best_within_the_limits_and_the_worst_memory(speed: ModuleType) -> None:
    every = speed.variants(24, 8, [1, 4, 8], [1, 8, 16])
    faster = {v.name: [1.0] if v.plain else [float(v.reuse + (v.staleness or 0))] for v in every}
    held = {v.name: 100.0 if v.plain else 90.0 + v.rollouts for v in every}
    told = speed.summary(every, faster, held, (50.04, 0.01))
    assert told == {"frozen_ratio": 4, "student_ratio": 9, "memory_ratio": 1.14, "seconds_to_erase": 50.0}
    assert speed.summary(every, faster, held, (50.0, 0.2))["seconds_to_erase"] is None


def test_a_peak_is_what_is_held_beyond_the_beginning(speed: ModuleType) -> None:
    def hold() -> None:
        assert torch.ones(2**24).sum() == 2**24  # 64 MiB
        assert torch.ones(2**22).sum() == 2**22

    assert 60 < speed.peak(hold, "cpu") < 80


def test_batches_are_compared_with_one_prompt_at_a_time(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = benchmark("generate_speed")
    knobs = "--images 5 --batch 3 --steps 2 --rounds 2 --device cpu"
    small = ["--model", str(tiny_model_dir), *knobs.split()]
    drawing.main(small)
    *rounds, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert len(rounds) == 4 and told["noise_identical"] and told["largest_pixel_difference"] <= 1
    assert told["ratio"] > 0 and len(told["ratio_by_round"]) == 2
    with pytest.raises(SystemExit):
        drawing.main([*small, "--least", "1000"])


def test_prompts_of_a_benchmark_are_spread_over_what_the_model_knows() -> None:
    prompts = benchmark("generate_speed").prompts_of("checkpoints/emoji-sd", 32)
    assert len(set(prompts)) == 32 and len({prompt.split(" in the ")[0] for prompt in prompts}) == 32


def test_capturing_attention_is_compared_with_plain_sampling(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = "--images 2 --steps 2 --rounds 2 --device cpu"
    benchmark("attention_capture").main(["--model", str(tiny_model_dir), *small.split()])
    *rounds, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert len(rounds) == 2 and told["pictures_identical"] and told["places"] == 4 and told["maps_gib"] > 0
    assert told["ratio"] > 0 and len(told["ratio_by_round"]) == 2
