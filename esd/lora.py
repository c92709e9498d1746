"""LoRA: every selected matrix learns a product of two thin ones beside it, and the base itself never moves.

    W x  becomes  W x + (alpha / rank) B A x,   A: rank x in,  B: out x rank

A begins random and B at zero, so that the student begins as the base. PEFT puts the layers in; the teacher is the
same module with the adapter switched off, on again before anything is differentiated. It runs under autocast where
the student does, as in `esd.weights`.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; convolutions as in
huggingface/peft, tuners/lora/layer.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import float8, seeding
from .errors import UserError
from .weights import Views

_ADAPTER = "esd"


@dataclass(frozen=True)
class Lora:
    """How thin the product is, and how much it counts.

    Attributes:
        rank: columns of B and rows of A, >= 1.
        alpha: the product is scaled by alpha / rank, > 0.
    """

    rank: int
    alpha: float


class LowRank(Mapping[str, Tensor]):
    """Differences kept as factors: each is multiplied out when it is asked for.

    Attributes:
        factors: (A, B) by parameter name, float32 on the CPU; A (rank, in, ...), B (out, rank, ...).
        lora: rank and scale.
    """

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]], lora: Lora) -> None:
        self.factors, self.lora = dict(factors), lora

    def __getitem__(self, name: str) -> Tensor:
        """The difference (out, in, ...) of one parameter, float32."""
        down, up = self.factors[name]
        product = up.flatten(1) @ down.flatten(1)
        return (product * (self.lora.alpha / self.lora.rank)).reshape(len(up), *down.shape[1:])

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def tensors(self) -> dict[str, Tensor]:
        """The factors under the names that PEFT gives them."""
        return {
            f"{layer_of(name)}.lora_{letter}.weight": factor
            for name, pair in self.factors.items()
            for letter, factor in zip("AB", pair, strict=True)
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], lora: Lora) -> LowRank:
        """What `tensors` returned, as factors again.

        Raises:
            KeyError: a factor lacks the other one.
        """
        paths = dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", name) for name in tensors)
        return cls(
            {f"{path}.weight": (tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]) for path in paths},
            lora,
        )


def matrices(module: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers whose weights an adapter can stand beside, by the name of that weight.

    Biases, norms and embeddings are no matrices that multiply an input; they stay as they are.

    Raises:
        UserError: there is none among the names, or the module takes no adapters.
    """
    if not hasattr(module, "add_adapter"):
        raise UserError(
            f"weights=lora: diffusers puts no adapters on {type(module).__name__}; set weights=full, with a finer "
            "selection where memory is short"
        )
    layers = dict(module.named_modules())
    found = {
        name: layers[layer_of(name)]
        for name in names
        if name.endswith(".weight") and isinstance(layers[layer_of(name)], nn.Linear | nn.Conv2d)
    }
    if not found:
        raise UserError(
            f"weights=lora: the selection holds no linear or convolution weight of {type(module).__name__}; select "
            "some, such as esd_x, or set weights=full"
        )
    return found


def shapes(module: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of what an adapter stands beside, a convolution's weight as the matrix that it is.

    Raises:
        UserError: see `matrices`.
    """
    weights: dict[str, Any] = {name: layer.weight for name, layer in matrices(module, names).items()}
    return {name: (len(weight), math.prod(weight.shape[1:])) for name, weight in weights.items()}


def size(module: nn.Module, names: Iterable[str], rank: int) -> int:
    """How many values an adapter on these parameters trains."""
    return sum(rank * (rows + columns) for rows, columns in shapes(module, names).values())


class _AdapterOff:
    """The base, callable like the module that wears the adapter; never records gradients."""

    def __init__(self, module: Any) -> None:
        self._module = module

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._module.disable_adapters()
        try:
            return self._module(*args, **kwargs)
        finally:
            self._module.enable_adapters()


class LoraViews(Views):
    """An adapter beside the selected weights is learned; the teacher is the module with the adapter off.

    Args:
        module: the denoiser, of diffusers; changed in place until `restore`.
        names: full parameter names of `module`; see `matrices` for those that count.
        lora: rank and scale.
        seed: of A.

    Raises:
        UserError: see `matrices`; or the module wears an adapter already.
    """

    def __init__(self, module: Any, names: Iterable[str], lora: Lora, seed: int) -> None:
        if getattr(module, "peft_config", None):
            raise UserError(f"{type(module).__name__} wears an adapter already; call pipe.unload_lora_weights() first")
        self.names, self.lora = tuple(matrices(module, names)), lora
        super().__init__(module)
        module.add_adapter(peft_config(lora, self.names), adapter_name=_ADAPTER)
        self.teacher = _AdapterOff(module)
        for number, (name, parameter) in enumerate(self.named_parameters().items()):
            parameter.data = parameter.data.float()
            if ".lora_A." in name:  # as PEFT begins, but from this seed
                start = torch.empty(parameter.shape)
                generator = seeding.generator(seed, "lora", number)
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                parameter.data.copy_(start)
            parameter.requires_grad_(True)

    @property
    def base(self) -> dict[str, Tensor]:  # type: ignore[override]  # they are in the module: no copies
        """The weights that the adapter stands beside, which do not move; not as float8 where they are stored so."""
        layers = dict(self.student.named_modules())
        return {name: float8.whole(layers[f"{layer_of(name)}.base_layer"]) for name in self.names}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The factors, float32, A before B, in the order selected."""
        parameters = dict(self.student.named_parameters())
        return {
            f"{layer_of(name)}.lora_{letter}.weight": parameters[f"{layer_of(name)}.lora_{letter}.{_ADAPTER}.weight"]
            for name in self.names
            for letter in "AB"
        }

    def differences(self) -> LowRank:
        """Student minus base, as factors on the CPU."""
        return LowRank.of_tensors(self.values(), self.lora)

    @torch.no_grad()
    def pull(self, share: float) -> float:
        """Shrinks B by this share; returns the distance left (L2)."""
        factors = list(self.named_parameters().values())
        squares = []
        for down, up in zip(factors[::2], factors[1::2], strict=True):
            up.mul_(1 - share)
            a, b = down.flatten(1), up.flatten(1)
            squares.append(((b.T @ b) * (a @ a.T)).sum())  # |BA|^2 without multiplying it out
        return float(torch.stack(squares).sum().clamp(min=0).sqrt()) * self.lora.alpha / self.lora.rank

    def _take_off(self) -> None:
        module: Any = self.student
        module.unload_lora()


def peft_config(lora: Lora, names: Iterable[str]) -> Any:
    """PEFT's description of an adapter beside these weights and no other.

    Args:
        names: full parameter names; what they end with is not enough, as one may be the end of another.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number; the hint says int
        target_modules="|".join(re.escape(layer_of(name)) for name in names),
    )


def layer_of(name: str) -> str:
    """The layer that a weight belongs to."""
    return name.removesuffix(".weight")
