"""What calls of a model make, counted on tensors without values.

The denoiser is built once more out of *fake* tensors, which have shapes and no values; the code that trains runs on it,
and every storage is counted from when it is made till it is freed. So nothing is estimated from formulas: activations,
what gradient checkpointing spares, copies that autocast makes and gradients are all in the figure, for any model and
selection. Norms under CUDA's autocast are float32, here they are not.

Source: ours; counting storages under fake tensors is how torch.distributed._tools.mem_tracker does it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esd import float8, objectives
from esd.families import Conditioning, Family
from esd.learner import make_views
from esd.plan import TrainPlan
from esd.weights import Views


class Counter(TorchDispatchMode):
    """Counts the bytes of all storages that are made in a `with` block, from when they are made till they are freed.

    Attributes:
        now: bytes there are.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never counts what holds these tensors: they were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._known:
                self._known[storage] = None
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class StandIn:
    """A denoiser of fake tensors as student and teacher, ready to be called as the real one is."""

    family: Family
    views: Views
    cond: Conditioning
    autocast: Callable[[], Any]

    def passing(self, rows: int, latents: Sequence[int]) -> int:
        """The most bytes that a call of so many rows makes, without gradients."""
        with self._counting() as counter, torch.no_grad():
            self._predict(rows, latents)
        return counter.peak

    def learning(self, plan: TrainPlan, latents: Sequence[int]) -> int:
        """The most bytes that a forward and a backward pass of one micro-batch make, gradients included."""
        rows = plan.batch_size * (2 if plan.preserve else 1)
        with self._counting() as counter:
            if plan.gradient_accumulation > 1:  # those of the pass before are there
                for parameter in self.views.parameters():
                    parameter.grad = torch.empty_like(parameter)
            prediction = self._predict(rows, latents)
            objectives.loss(prediction, torch.empty_like(prediction), None).sum().backward()
        return counter.peak

    def _predict(self, rows: int, latents: Sequence[int]) -> Tensor:
        x, t = torch.empty(rows, *latents), torch.empty(rows)
        with self.autocast():
            return self.family.predict(self.views.student, x, t, self.cond[[0] * rows])

    @contextmanager
    def _counting(self) -> Iterator[Counter]:
        counter = Counter()
        there = [*self.views.student.parameters(), *self.views.student.buffers()]
        counter.ignore([*there, *self.cond.tensors.values()])
        with counter:
            yield counter


@contextmanager
def stand_in(
    family: Family, plan: TrainPlan, names: Sequence[str], cond: Conditioning, mixed_precision: str
) -> Iterator[StandIn]:
    """The family's denoiser out of fake tensors, as the plan trains it; they are fake only inside the block."""
    precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    student = _twin(family.denoiser, family.dtype)
    with float8.stored(student) if plan.frozen else nullcontext():
        views = make_views(student, names, plan)
        if plan.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        with FakeTensorMode():
            _make_fake(student)
            told = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in cond.tensors.items()}
            yield StandIn(
                family,
                views,
                Conditioning(told),
                lambda: torch.autocast("cpu", precision, enabled=mixed_precision != "no"),
            )


def drawing(family: Family, plan: TrainPlan, names: Sequence[str], cond: Conditioning, rows: int) -> int:
    """The most bytes that a call of the stock pipeline's denoiser makes: without autocast, an adapter merged."""
    denoiser = _twin(family.denoiser, family.dtype)
    with float8.stored(denoiser, but=names) if plan.frozen else nullcontext(), FakeTensorMode():
        _make_fake(denoiser)
        told = Conditioning({name: torch.empty(rows, *t.shape[1:], dtype=t.dtype) for name, t in cond.tensors.items()})
        x, t = torch.empty(rows, *family.latent_shape()), torch.empty(rows)
        counter = Counter()
        counter.ignore([*denoiser.parameters(), *denoiser.buffers()])
        with counter, torch.no_grad():
            family.predict(denoiser, x, t, told)
    return counter.peak


def decoder(family: Family, images: int) -> int:
    """The most bytes that decoding so many pictures makes."""
    (real,) = family.modules("vae")
    vae = _twin(real, family.dtype)
    with FakeTensorMode():
        _make_fake(vae)
        latents = torch.empty(images, *family.decoded_shape(), dtype=family.dtype)
        counter = Counter()
        counter.ignore([*vae.parameters(), *vae.buffers()])
        with counter, torch.no_grad():
            vae.decode(latents, return_dict=False)
    return counter.peak


def _twin(module: Any, dtype: torch.dtype) -> Any:
    """A module as this one is configured, on the meta device, its parameters in another precision."""
    with torch.device("meta"):
        twin = type(module).from_config(module.config)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    return twin


def _make_fake(module: nn.Module) -> None:
    """Puts fake tensors of the CPU in place of those on the meta device, whose attention would be another."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
