"""How fast we train beside a plain loop that does what the original scripts do: updates per second, memory, rates.

    python scripts/benchmarks/train_speed.py                                # says first how long it will take
    python scripts/benchmarks/train_speed.py --rounds 1 --parts speed memory # speed and memory only
    python scripts/benchmarks/train_speed.py --model path/to/pipeline --device cuda --reuse 4 --staleness 8

The plain loop is `Plain` below, written from parts of diffusers alone: for every update sample up to a random step with
guidance, ask a second, frozen copy of the UNet twice, and make one step of Adam on the student. Ours is
`esd.trainer.train` as a user runs it. Both train the same parameters of the same model on the same prompt with the same
objective, batch, steps, guidance and learning rate, in float32. What differs is `VARIANTS`: who samples, and for how
long a sampled point serves.

Speed: rounds in alternation, every variant once in each; a ratio compares the two of one round, and the median and the
range over rounds are told. A bank is timed over its whole life, built and used up. What the plain loop costs depends on
the random step, so its timed updates take steps spread evenly over all.
Memory: one process for each variant, the peak beyond what it holds once the model is loaded.
Rates: trained for equally many updates, and read by the model's judge where there is one.
The last line is JSON; what was not measured is null.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from esd import learner, trainer
from esd.checkpoint import FILE_NAME, apply
from esd.config.common import ModelConfig
from esd.config.train import TrainConfig
from esd.config.train_sections import ObjectiveConfig, TrainingConfig, TrajectoryConfig
from esd.errors import UserError
from esd.evaluation.erasure import exam, known_targets
from esd.evaluation.generate import sample
from esd.evaluation.judges import load_judge
from esd.evaluation.metrics import erasure_rates
from esd.evaluation.prompts import say
from esd.evaluation.vocabulary import Vocabulary
from esd.families import Family
from esd.model import check, find_device, load
from esd.plan import TrainPlan
from esd.train import make_plan

MIB = 2**20
PARTS = ("speed", "memory", "rates", "erase")


@dataclass(frozen=True)
class Work:
    """What every variant does in one update; the same for all of them."""

    model: str = "checkpoints/emoji-sd"
    device: str = "cpu"
    concept: str = "cat"
    selection: str = "esd_u"
    batch: int = 16
    steps: int = 50
    max_batch: int = 32
    guidance: float = 3.0
    eta: float = 2.0
    lr: float = 1e-4

    @property
    def prompt(self) -> str:
        """The one training prompt."""
        return say("a {}", {"": self.concept})


@dataclass(frozen=True)
class Variant:
    """Who draws the points of training, and for how long they serve."""

    name: str
    sampler: str
    plain: bool = False
    rollouts: int = 0
    reuse: int = 1
    staleness: int | None = None


def variants(rollouts: int, student_rollouts: int, reuses: Sequence[int], stalenesses: Sequence[int]) -> list[Variant]:
    """The plain loop with either sampler, each followed by ours with these knobs."""
    frozen = [Variant(f"bank, reuse {n}", "teacher", rollouts=rollouts, reuse=n) for n in reuses]
    anew = [Variant(f"on policy, staleness {n}", "student", staleness=n) for n in stalenesses]
    banks = [
        Variant(f"student's bank, staleness {n}", "student", rollouts=student_rollouts, staleness=n)
        for n in stalenesses
        if n > 1
    ]
    plain = [Variant(f"plain loop, {who} samples", who, plain=True) for who in ("teacher", "student")]
    return [plain[0], *frozen, plain[1], *anew, *banks]


class Plain:
    """ESD as the original scripts have it, batched: sample up to step i, two teacher calls, one step of Adam.

    Args:
        pipe: a stock Stable Diffusion pipeline.
        unet: the student, trained in place.
        names: its parameters to train.
        work: the sizes.
        sampler: "teacher" or "student".
        seed: of noise and steps.
    """

    def __init__(self, pipe: Any, unet: Any, names: Sequence[str], work: Work, sampler: str, seed: int) -> None:
        self.student, self.teacher = unet, copy.deepcopy(unet).requires_grad_(False)
        self.sampler = self.student if sampler == "student" else self.teacher
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name in names)
        self.adam = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=work.lr)
        self.scheduler, self.work = copy.deepcopy(pipe.scheduler), work
        with torch.no_grad():
            encoded = [pipe.encode_prompt(text, unet.device, 1, False)[0] for text in (work.prompt, "")]
        self.concept, self.null = (states.repeat(work.batch, 1, 1) for states in encoded)
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self) -> Tensor:
        """x_T (batch, c, h, w)."""
        config = self.student.config
        shape = (self.work.batch, config.in_channels, config.sample_size, config.sample_size)
        return torch.randn(shape, generator=self.generator).to(self.concept.device)

    def step(self) -> int:
        """A random step of the sampler; one for the whole batch."""
        return int(torch.randint(self.work.steps, (), generator=self.generator))

    @torch.no_grad()
    def sample(self, noise: Tensor, stop: int) -> tuple[Tensor, Tensor]:
        """(x_t as the UNet gets it, t) after `stop` guided steps."""
        self.scheduler.set_timesteps(self.work.steps)  # also forgets the last rollout
        x = noise * self.scheduler.init_noise_sigma
        both = torch.cat([self.null, self.concept])
        for t in self.scheduler.timesteps[:stop]:
            x_in = self.scheduler.scale_model_input(torch.cat([x, x]), t)
            null, concept = self.sampler(x_in, t, encoder_hidden_states=both).sample.chunk(2)
            x = self.scheduler.step(null + self.work.guidance * (concept - null), t, x).prev_sample
        t = self.scheduler.timesteps[stop]
        return self.scheduler.scale_model_input(x, t), t

    def loss(self, x: Tensor, t: Tensor) -> Tensor:
        """Squared error to eps(null) - eta (eps(concept) - eps(null))."""
        with torch.no_grad():
            concept = self.teacher(x, t, encoder_hidden_states=self.concept).sample
            null = self.teacher(x, t, encoder_hidden_states=self.null).sample
        said = self.student(x, t, encoder_hidden_states=self.concept).sample
        return F.mse_loss(said, null - self.work.eta * (concept - null))

    def update(self, stop: int) -> None:
        """One update, at a point after `stop` steps."""
        self.loss(*self.sample(self.noise(), stop)).backward()
        self.adam.step()
        self.adam.zero_grad()


def plan_of(work: Work, variant: Variant, updates: int, seed: int) -> TrainPlan:
    """What our trainer is told to do the same work."""
    path = TrajectoryConfig(
        sampler=variant.sampler, num_steps=work.steps, guidance_scale=work.guidance, rollouts=variant.rollouts,
        reuse=variant.reuse, staleness=variant.staleness, max_batch=work.max_batch,
    )  # fmt: skip
    training = TrainingConfig(updates=updates, batch_size=work.batch, lr=work.lr, clip_norm=0.0, save_every=0)
    config = TrainConfig(
        concepts=[work.concept], prompts=["a {}"], selection=work.selection, seed=seed, trajectory=path,
        training=training, objective=ObjectiveConfig(eta=work.eta), model=ModelConfig(work.model),
    )  # fmt: skip
    config.check()
    return make_plan(config, None)


def plain_loop(family: Family, work: Work, sampler: str, seed: int, *, copied: bool = True) -> Plain:
    """The plain loop on the family's device; trains a copy of the UNet, or the UNet itself."""
    family.place("encoders", "denoiser")
    unet = copy.deepcopy(family.denoiser) if copied else family.denoiser
    return Plain(family.pipe, unet, family.select(work.selection).names, work, sampler, seed)


def train(family: Family, work: Work, variant: Variant, updates: int, seed: int, folder: Path) -> float:
    """Seconds that so many updates took; ours leaves folder/erased.safetensors, the plain loop a changed UNet."""
    if variant.plain:
        plain = plain_loop(family, work, variant.sampler, seed, copied=False)
        return timed(lambda: [plain.update(plain.step()) for _ in range(updates)], work.device)
    plan = plan_of(work, variant, updates, seed)
    return trainer.train(family, plan, folder, Accelerator(cpu=work.device == "cpu")).seconds


def timed(do: Callable[[], Any], device: str) -> float:
    """Seconds that it takes, everything on the device done."""
    started = time.perf_counter()
    do()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def lifetime(family: Family, work: Work, variant: Variant, least: int) -> int:
    """Updates in which points are drawn and used up, as often as it takes to make `least` updates."""
    plan = plan_of(work, variant, 1, 0)
    one = learner.point_sources(family, plan, None, None, 1)[0].updates_per_build
    return one * -(-least // one)


def seconds_per_update(family: Family, work: Work, variant: Variant, least: int, seed: int) -> float:
    """Of one variant in one round; the family's model is the base before and after."""
    if variant.plain:
        plain = plain_loop(family, work, variant.sampler, seed)
        stops = [int((i + 0.5) * work.steps / least) for i in range(least)]
        return timed(lambda: [plain.update(stop) for stop in stops], work.device) / least
    updates = lifetime(family, work, variant, least)
    with tempfile.TemporaryDirectory() as folder:
        return train(family, work, variant, updates, seed, Path(folder)) / updates


def estimate(family: Family, work: Work, every: Sequence[Variant]) -> list[tuple[Variant, float]]:
    """Seconds per update to expect of each variant: those of an update without sampling, and of its guided calls."""
    plain = plain_loop(family, work, "teacher", 0)
    _, without, with_two = (timed(partial(plain.update, stop), work.device) for stop in (0, 0, 2))
    each_call = max(0.0, with_two - without) / 2  # a busy machine may time two steps faster
    expected = []
    for v in every:
        calls = (work.steps - 1) / 2
        if v.rollouts:
            calls = v.rollouts * work.steps / (work.batch * lifetime(family, work, v, 1))
        expected.append((v, without + calls * each_call))
    return expected


def peak(do: Callable[[], Any], device: str) -> float:
    """MiB held at the most while something is done, beyond those held before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        do()
        return (torch.cuda.max_memory_allocated() - held) / MIB
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    do()
    done.set()
    watcher.join()
    return (max(seen) - seen[0]) / MIB


def memory(work: Work, variant: Variant, updates: int = 3) -> float:
    """Peak MiB of training with one variant, beyond those of the loaded model; in a process of its own."""
    family = load(ModelConfig(work.model), work.device)
    family.place("encoders", "denoiser")
    with tempfile.TemporaryDirectory() as folder:
        return peak(lambda: train(family, work, variant, updates, 0, Path(folder)), work.device)


def rates(work: Work, variant: Variant, updates: int, images: int) -> tuple[float, float]:
    """(target, retained) rates after so many updates, of a thing or style that the model's judge knows."""
    vocabulary, judge = Vocabulary.load(work.model), load_judge(work.model)
    assert vocabulary and judge
    family = load(ModelConfig(work.model), work.device)
    with tempfile.TemporaryDirectory() as folder:
        train(family, work, variant, updates, 0, Path(folder))
        if not variant.plain:
            apply(family.pipe, Path(folder) / FILE_NAME)
    targets, _ = known_targets([work.concept], vocabulary, judge)
    rows = exam(vocabulary, targets, images, images, 0)
    prompts, seeds = [row.prompt for row in rows], [row.evaluation_seed for row in rows]
    with family.drawing() as pipe:
        read = judge(sample(pipe, prompts, seeds, num_steps=20, guidance_scale=4.0, batch_size=32))
    found = erasure_rates(rows, read, read, targets)
    return found["target"]["after"], found["same_domain"]["after"]


def seconds_to_erase(work: Work, images: int) -> tuple[float, float]:
    """(seconds of training, target rate after) of experiment=erase_thing_quick as shipped."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "experiment": "erase_thing_quick", "concepts": f"[{work.concept}]", "model.path": work.model,
            "device": work.device, "run_dir": f"{folder}/run", "evaluation.target_images": images,
            "evaluation.retained_images": images, "evaluation.implied_images": 0,
        }  # fmt: skip
        command = [sys.executable, "-m", "esd.train", *(f"{name}={value}" for name, value in asked.items())]
        subprocess.run(command, check=True, stdout=sys.stderr)
        told = json.loads((Path(folder) / "run/summary.json").read_text())
    return told["seconds"], told["target"]["after"]


def summary(
    every: Sequence[Variant],
    faster: dict[str, list[float]],
    held: dict[str, float],
    erased: tuple[float, float] | None,
) -> dict[str, float | None]:
    """The last line: ratios at reuse <= 4 and staleness <= 8, the worst memory ratio, seconds if the concept went."""

    def best(sampler: str) -> float | None:
        ours = [v for v in every if v.sampler == sampler and not v.plain and faster[v.name]]
        medians = [statistics.median(faster[v.name]) for v in ours if v.reuse <= 4 and (v.staleness or 1) <= 8]
        return round(max(medians), 2) if medians else None

    plain = {v.sampler: held[v.name] for v in every if v.plain and held}
    beside = [held[v.name] / plain[v.sampler] for v in every if held and not v.plain]
    return {
        "frozen_ratio": best("teacher"),
        "student_ratio": best("student"),
        "memory_ratio": round(max(beside), 3) if beside else None,
        "seconds_to_erase": round(erased[0], 1) if erased and erased[1] <= 0.05 else None,
    }


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError
        return number

    def add(name: str, default: Any, meaning: str, **more: Any) -> None:
        kind = str if isinstance(default, str) or "choices" in more else positive
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} (%(default)s)", **more)

    add("model", Work.model, "a Stable Diffusion folder, or its name on the hub")
    add("device", Work.device, "cpu or cuda")
    add("concept", Work.concept, "what is erased")
    add("selection", Work.selection, "parameters trained")
    add("batch", Work.batch, "points of an update")
    add("steps", Work.steps, "of the sampler")
    add("max-batch", Work.max_batch, "most rows in a call of our sampler; the plain loop's have twice the batch")
    add("reuse", [1, 4, 8], "how often a point of the frozen bank serves", nargs="+")
    add("staleness", [1, 8], "updates that points by the student serve", nargs="+")
    add("rollouts", 24, "in the frozen bank")
    add("student-rollouts", 8, "in the student's bank")
    add("parts", list(PARTS), "what is measured", nargs="+", choices=PARTS)
    add("rounds", 3, "of speed")
    add("least", 4, "updates of each variant in a round; a bank is always used up")
    add("updates", 30, "trained before rates are read")
    add("images", 100, "pictures of the target, and as many others, that are read")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # this program, called by itself
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    asked = arguments(given)
    work = Work(asked.model, asked.device, asked.concept, asked.selection, asked.batch, asked.steps, asked.max_batch)
    every = variants(asked.rollouts, asked.student_rollouts, asked.reuse, asked.staleness)
    if asked.memory_of:
        print(memory(work, next(v for v in every if v.name == asked.memory_of)))
        return
    check(ModelConfig(work.model))
    family = load(ModelConfig(work.model), find_device(work.device))
    if family.name != "stable-diffusion":
        raise UserError(f"--model {work.model}: the plain loop is for Stable Diffusion 1 and 2, not for {family.name}")
    _, unread = known_targets([work.concept], Vocabulary.load(work.model), load_judge(work.model))
    if unread and {"rates", "erase"} & set(asked.parts):
        raise UserError(f"--parts {' '.join(asked.parts)}: {unread}; allowed: speed, memory")
    expected = estimate(family, work, every)
    once = sum(each * (asked.least if v.plain else lifetime(family, work, v, asked.least)) for v, each in expected)
    minutes = {"speed": asked.rounds * once / 60, "rates": asked.updates * sum(each for _, each in expected) / 60}
    parts = [f"{minutes[part]:.0f} min of {part}" for part in asked.parts if part in minutes]
    print("takes", ", ".join([*parts, "a few minutes for the rest"]), flush=True)

    seconds: dict[str, list[float]] = {v.name: [] for v in every}
    for number in range(asked.rounds if "speed" in asked.parts else 0):
        for v in every[:: 1 if number % 2 == 0 else -1]:
            seconds[v.name].append(seconds_per_update(family, work, v, asked.least, number))
            print(f"round {number + 1} of {asked.rounds}: {v.name}: {seconds[v.name][-1]:.3f} s/update", flush=True)
    beside = {v.sampler: seconds[v.name] for v in every if v.plain}
    faster = {v.name: [a / b for a, b in zip(beside[v.sampler], seconds[v.name], strict=True)] for v in every}
    del family
    itself = [sys.executable, __file__, *(sys.argv[1:] if given is None else given), "--memory-of"]
    held: dict[str, float] = {}
    for v in every if "memory" in asked.parts else []:
        told = subprocess.run([*itself, v.name], check=True, stdout=subprocess.PIPE, text=True).stdout
        held[v.name] = float(told.split()[-1])
        print(f"memory: {v.name}: {held[v.name]:.0f} MiB", flush=True)
    read: dict[str, tuple[float, float]] = {}
    for v in every if "rates" in asked.parts else []:
        read[v.name] = rates(work, v, asked.updates, asked.images)
        target, retained = read[v.name]
        print(f"after {asked.updates} updates: {v.name}: {target:.0%} target, {retained:.0%} retained", flush=True)
    erased = seconds_to_erase(work, asked.images) if "erase" in asked.parts else None
    if erased:
        print(f"experiment=erase_thing_quick: target at {erased[1]:.0%} after {erased[0]:.1f} s of training")

    print("| variant | updates/s | times as fast | MiB | target | retained |\n|---|---|---|---|---|---|")
    for v in every:
        cells = ["", "", f"{held[v.name]:.0f}" if held else ""]
        cells += [f"{rate:.0%}" for rate in read.get(v.name) or ()] or ["", ""]
        if took := seconds[v.name]:
            times = faster[v.name]
            cells[0] = f"{1 / statistics.median(took):.3g}"
            cells[1] = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        print(f"| {' | '.join([v.name, *cells])} |")
    print(json.dumps(summary(every, faster, held, erased)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
