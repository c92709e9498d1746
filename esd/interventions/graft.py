"""`Graft` puts other weights into a model, such as the base's into an erased one, in some steps or in all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esd.errors import UserError
from esd.families import Family

from .clock import Moment
from .ops import Op


@dataclass(frozen=True, kw_only=True)
class Graft(Op):
    """Other values in the parameters that an expression names; the model's own are back afterwards, bit for bit.

    Attributes:
        where: an expression of `esd.selection`, read over parameters.
        weights: the other values by full parameter name, of this architecture; of the parameters that `where` names,
            those that these lack stay.
    """

    where: str = field(kw_only=False)
    weights: Mapping[str, Tensor] = field(repr=False)
    _live: dict[str, torch.nn.Parameter] = field(init=False, repr=False, compare=False, default_factory=dict)
    _own: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _other: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)
    _is_in: list[bool] = field(init=False, repr=False, compare=False, default_factory=lambda: [False])

    @contextmanager
    def attached(self, family: Family) -> Iterator[None]:
        """Takes them off again on any exit.

        Raises:
            UserError: `where` names none of the weights; they are of another architecture; the model keeps its own
                elsewhere; or rows or a pass are asked for, which weights do not know.
        """
        if self.on != "both" or self.rows is not None:
            raise UserError("Graft: weights serve the whole batch; leave `on` and `rows`")
        self._refuse_others(family)
        names = [name for name in family.select(self.where).names if name in self.weights]
        if not names:
            raise UserError(f"Graft: {self.where!r} names no parameter among the {len(self.weights)} weights given")
        parameters = dict(family.denoiser.named_parameters())
        if away := [name for name in names if parameters[name].is_meta]:
            raise UserError(
                f"Graft: {away[0]} comes from elsewhere at each call of its layer (sequential CPU offload), whatever "
                "is put in; call pipe.remove_all_hooks(), or offload by enable_model_cpu_offload()"
            )
        for name in names:
            live = self._live[name] = parameters[name]
            self._own[name], self._other[name] = live.data, self.weights[name].to(live.data)
        try:
            yield
        finally:
            self._put(self._own)
            self._is_in[0] = False
            for held in (self._live, self._own, self._other):
                held.clear()

    def _refuse_others(self, family: Family) -> None:
        """Raises UserError for weights that the denoiser has not, or has in another shape."""
        own, name = family.denoiser.state_dict(), type(family.denoiser).__name__
        for key, value in self.weights.items():
            if key not in own:
                raise UserError(f"Graft: {name} has no {key}, which the weights have; give those of the same model")
            if value.shape != own[key].shape:
                raise UserError(
                    f"Graft: {key} is {tuple(value.shape)} in the weights and {tuple(own[key].shape)} in {name}; give "
                    "those of a model of the same architecture"
                )

    def leave(self, moment: Moment) -> None:
        """Puts the own weights back where these held until now; before any other's are put in."""
        if self._is_in[0] and not moment.within(self.steps):
            self._put(self._own)
            self._is_in[0] = False

    def begin(self, moment: Moment) -> None:
        """Puts in the weights that hold in this step; where several grafts do, the last one's.

        Raises:
            UserError: gradients are recorded; blocks that are computed again on the way back would find other weights.
        """
        if torch.is_grad_enabled() and any(live.requires_grad for live in self._live.values()):
            raise UserError("Graft: weights cannot change places under gradients; sample under torch.no_grad()")
        if moment.within(self.steps):
            self._put(self._other)
            self._is_in[0] = True

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, live in self._live.items():
            live.data = values[name]
