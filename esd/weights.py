"""Student and teacher as two views of one model.

The live module is the student. The teacher is the same module called through `torch.func.functional_call`
with base copies of only the selected tensors, under `no_grad`: no second model, and bit for bit the base's
outputs at every moment of training, because nothing unselected ever changes. Swapping the *student* in and
out instead would break under gradient checkpointing (the backward recomputation would run with the wrong
weights: silently wrong gradients).

Selected tensors become float32 masters whatever the base's precision: at learning rates of 1e-5 a bf16
weight mostly never moves, the update being under half its last bit. A float32 master inside a bf16 model
needs autocast around the student's forward pass; the teacher's tensors keep the base's precision and need
none. Where there is autocast the teacher runs under it too: both round alike, and it is then bit for bit what the
base says under autocast, which over a float32 base is not what the base says without. Training without masters
is there to reproduce the scripts that do: `masters=False`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError

_FUSED = ("to_qkv", "to_kv", "to_added_qkv")  # what `fuse_qkv_projections` puts beside to_q, to_k and to_v


def refuse_fused(module: nn.Module) -> None:
    """Raises UserError where attention projections are fused: to_q, to_k and to_v are still there, and nothing
    reads them, so that training or changing them would do nothing.
    """
    fused = [name for name, _ in module.named_modules() if name.rpartition(".")[2] in _FUSED]
    if fused:
        raise UserError(
            f"{type(module).__name__} has fused projections ({fused[0]}), beside which to_q, to_k and to_v are dead; "
            "load the model again and do not call fuse_qkv_projections()"
        )


class Teacher:
    """The frozen base, callable like the module it is a view of; never records gradients."""

    def __init__(self, module: nn.Module, base: Mapping[str, Tensor]) -> None:
        self._module, self._base = module, base

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output as it was before training."""
        return torch.func.functional_call(self._module, dict(self._base), args, kwargs)


class Views(ABC):
    """Student and teacher of one module, and the values that are learned; `restore` gives the module back.

    Attributes:
        student: the live module itself (pass it, or its DDP wrapper, to the optimiser's side).
        teacher: callable like the module; what the frozen base says, without gradients.
        names: the parameters of the base that the student departs from.
        base: these parameters as they are in the base, in their own precision.
    """

    student: nn.Module
    teacher: Callable[..., Any]
    names: tuple[str, ...]
    base: Mapping[str, Tensor]

    def __init__(self, module: nn.Module) -> None:
        """Freezes every parameter, and remembers which required gradients."""
        self.student = module
        self._required = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        module.requires_grad_(False)

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters that are learned, by name, in the order selected."""

    @abstractmethod
    def differences(self) -> Mapping[str, Tensor]:
        """Student minus base by `names`, float32 on the CPU: what a checkpoint holds."""

    @abstractmethod
    def pull(self, share: float) -> float:
        """Moves the student this share of the way back to the base; returns its distance from it then (L2).

        Weight decay shrinks weights to 0, which a trained model is not made of; here 0 is the base.
        """

    @abstractmethod
    def _take_off(self) -> None:
        """Puts the base's own parameters back, bit for bit."""

    def parameters(self) -> list[nn.Parameter]:
        """The live parameters, for the optimiser."""
        return list(self.named_parameters().values())

    def values(self) -> dict[str, Tensor]:
        """The learned tensors by name, copied to the CPU: exactly what a resumed run needs."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.named_parameters().items()}

    @torch.no_grad()
    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Sets the student to what `values()` returned; base + difference would be off by a rounding.

        Raises:
            UserError: the names are not exactly the selected ones.
        """
        parameters = self.named_parameters()
        if odd := sorted(set(values) ^ set(parameters)):
            raise UserError(f"the saved state and the selection disagree on {odd[0]!r}; use the same selection")
        for name, parameter in parameters.items():
            parameter.copy_(values[name])

    def restore(self) -> None:
        """Puts the base back bit for bit, in its own precision, and every `requires_grad` as it was."""
        self._take_off()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(self._required[name])


class WeightViews(Views):
    """The selected parameters themselves are learned; the teacher is called with copies of their beginnings.

    Args:
        module: the denoiser; changed in place: selected parameters become float32 masters and require gradients,
            every other parameter stops requiring them.
        names: full parameter names of `module`.
        masters: learn in float32; False learns in the precision that the parameters have.

    Raises:
        UserError: no name given, or one that the module does not have.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], masters: bool = True) -> None:
        self.names = tuple(names)
        parameters = dict(module.named_parameters())
        missing = [name for name in self.names if name not in parameters]
        if missing or not self.names:
            what = f"{missing[0]!r} is no parameter" if missing else "no parameter is selected"
            raise UserError(f"{what} of {type(module).__name__}; select names it has")
        super().__init__(module)
        self.base: dict[str, Tensor] = {name: parameters[name].detach().clone() for name in self.names}
        for name in self.names:
            if masters:
                parameters[name].data = parameters[name].data.float()
            parameters[name].requires_grad_(True)
        self.teacher = Teacher(module, self.base)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The selected parameters, live."""
        parameters = dict(self.student.named_parameters())
        return {name: parameters[name] for name in self.names}

    @torch.no_grad()
    def differences(self) -> dict[str, Tensor]:
        """Student minus base by name, float32 on the CPU."""
        return {name: (p.float() - self.base[name].float()).cpu() for name, p in self.named_parameters().items()}

    @torch.no_grad()
    def pull(self, share: float) -> float:
        """Moves every parameter this share of the way back; returns the distance left (L2)."""
        squares = []
        for name, parameter in self.named_parameters().items():
            base = self.base[name].to(parameter.dtype)
            if share:
                parameter.lerp_(base, share)
            squares.append((parameter.float() - base.float()).square().sum())
        return float(torch.stack(squares).sum().sqrt())

    def _take_off(self) -> None:
        for name, parameter in self.named_parameters().items():
            parameter.data = self.base[name].clone()
            parameter.grad = None
