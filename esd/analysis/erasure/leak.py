"""Whether an erased model still knows the concept inside: linear probes on its features.

A probe is a logistic regression on the features of one layer, mean and spread over space, that tells inputs of the
concept from inputs of other things. It is taught by some inputs and tested by others. What comes in is

    synonym   pure noise under prompts; the probe is taught the concept's name, and tested by other words for it
    name      the same the other way round
    image     pictures of it by the base, noised half way, under the null prompt

against as many of other things each time, of which those of the test were not taught. Taught and tested by the same
word, a probe would only read that the word is in the prompt, whatever it means. How much a probe reads without the
model knowing anything is what it reads off the same model with its weights shuffled (`shuffled`): text encoder and
pictures are as they were. 50% is chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esd.evaluation.metrics import wilson
from esd.families import Conditioning, Denoiser, Family
from esd.interventions import Record, Site, attach, sample

OTHER_NOISE = 2**40  # added to the seed a picture was drawn from: the noise it gets is not the one it came from


@dataclass(frozen=True)
class Probe:
    """How well one layer's features tell the concept.

    Attributes:
        model: "base", "erased" or "shuffled".
        source: "synonym", "name" or "image".
        layer: label.
        k: right answers.
        n: tested inputs.
    """

    model: str
    source: str
    layer: str
    k: int
    n: int

    def row(self) -> dict[str, Any]:
        """As a table has it."""
        low, high = wilson(self.k, self.n)
        return {
            "model": self.model, "source": self.source, "layer": self.layer, "accuracy": self.k / self.n,
            "k": self.k, "n": self.n, "low": low, "high": high,
        }  # fmt: skip


def pooled(x: Tensor) -> Tensor:
    """Mean and standard deviation over space or tokens, (b, 2 d), of (b, d, h, w) or (b, tokens, d)."""
    tokens = x.flatten(2).mT if x.ndim == 4 else x
    return torch.cat([tokens.mean(1), tokens.std(1, correction=0)], dim=1)


@torch.no_grad()
def features(
    family: Family, denoiser: Denoiser, sites: Sequence[Site], x: Tensor, t: Tensor, cond: Conditioning, batch: int = 32
) -> dict[str, Tensor]:
    """By label of each layer, its pooled outputs (n, 2 d), float32 on the CPU.

    Args:
        family: of the model.
        denoiser: of base or erased model.
        sites: layers.
        x: what the denoiser gets (n, c, h, w).
        t: time (scalar).
        cond: n rows.
        batch: most rows in one call.
    """
    parts: dict[str, list[Tensor]] = {site.label: [] for site in sites}
    for start in range(0, len(x), batch):
        now = slice(start, start + batch)
        record = Record(sites, reduce=pooled)
        with attach(family, record):
            family.predict(denoiser, x[now], t, cond[now])
        for key, value in record.recording.values.items():
            if key.stream == "image":
                parts[record.recording.labels[key.path]].append(value.float())
    return {label: torch.cat(found) for label, found in parts.items()}


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], penalty: float = 1e-2) -> int:
    """Right answers on the test inputs of a logistic regression that was fitted to the others.

    Args:
        train, test: features (n, d) and whether each is of the concept (n,).
        penalty: of the squared weights, on standardised features.
    """
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.float())
        value = value + penalty * weights[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    with torch.no_grad():
        return int(((x_test @ weights[:-1] + weights[-1] > 0) == y_test.bool()).sum())


@dataclass(frozen=True)
class Inputs:
    """What a probe is shown.

    Attributes:
        x: what the denoiser gets (n, c, h, w).
        t: time (scalar).
        cond: n rows.
        concept: whether each is of the concept (n,).
        tested: whether each is kept for the test (n,); the others are for training.
    """

    x: Tensor
    t: Tensor
    cond: Conditioning
    concept: Tensor
    tested: Tensor


@dataclass(frozen=True)
class Asked:
    """A prompt of a probe.

    Attributes:
        prompt: the text.
        concept: whether it asks for the concept.
        tested: whether it is kept for the test.
    """

    prompt: str
    concept: bool
    tested: bool


def from_text(family: Family, asked: Sequence[Asked], *, seed: int, num_steps: int) -> Inputs:
    """Pure noise, a different one for each prompt, at the first time of sampling: all that is known is the text."""
    solver = family.scheduler(num_steps)
    noise = family.initial_noise([torch.Generator().manual_seed(seed + i) for i in range(len(asked))])
    t = solver.timesteps[0]
    x = family.model_input(solver, family.first_latents(solver, noise), t)
    return Inputs(x, t, family.encode([a.prompt for a in asked]), *_told(asked))


@torch.no_grad()
def from_pictures(
    family: Family, base: Denoiser, asked: Sequence[Asked], *, seed: int, num_steps: int, guidance_scale: float,
    batch: int = 32,
) -> Inputs:  # fmt: skip
    """Pictures that the base draws, noised to the middle of sampling, under the null prompt: the text says nothing."""
    prompts, seeds = [a.prompt for a in asked], list(range(seed, seed + len(asked)))
    clean = torch.cat([
        sample(family, prompts[i : i + batch], seeds[i : i + batch], num_steps=num_steps,
               guidance_scale=guidance_scale, denoiser=base).latents
        for i in range(0, len(asked), batch)
    ])  # fmt: skip
    solver = family.scheduler(num_steps)
    t = solver.timesteps[len(solver.timesteps) // 2]
    noise = family.initial_noise([torch.Generator().manual_seed(s + OTHER_NOISE) for s in seeds])
    alpha, sigma = (scale.to(clean) for scale in family.alpha_sigma(t.reshape(1)))
    null = family.null()
    return Inputs(alpha * clean + sigma * noise, t, null[[0] * len(asked)], *_told(asked))


def probes(
    family: Family, models: Mapping[str, Denoiser], sites: Sequence[Site], source: str, inputs: Inputs
) -> list[Probe]:
    """How well each layer of each model tells the concept.

    Args:
        family: of the models.
        models: name to denoiser.
        sites: layers.
        source: what the inputs are: "synonym", "name" or "image".
        inputs: see `from_text` and `from_pictures`.
    """
    found = []
    for name, denoiser in models.items():
        seen = features(family, denoiser, sites, inputs.x, inputs.t, inputs.cond)
        for layer, values in seen.items():
            train, test = ((values[rows], inputs.concept[rows]) for rows in (~inputs.tested, inputs.tested))
            found.append(Probe(name, source, layer, probe(train, test), int(inputs.tested.sum())))
    return found


@contextmanager
def shuffled(denoiser: torch.nn.Module, seed: int = 0) -> Iterator[None]:
    """Every parameter's numbers in another order for the length of a `with` block: as large, and knowing nothing.

    Afterwards they are where they were, bit for bit; no copy of the model is made.

    Args:
        denoiser: its parameters are written into.
        seed: of the order.
    """

    def orders() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for parameter in denoiser.parameters():
            yield parameter.data, torch.randperm(parameter.numel(), generator=generator).to(parameter.device)

    for data, order in orders():
        data.copy_(data.flatten()[order].view_as(data))
    try:
        yield
    finally:
        for data, order in orders():
            back = torch.empty_like(data.flatten())
            back[order] = data.flatten()
            data.copy_(back.view_as(data))


def _told(asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    return torch.tensor([a.concept for a in asked]), torch.tensor([a.tested for a in asked])
