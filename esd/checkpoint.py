"""Erased weights as a file: what changed, from which base, and how to put it on and take it off again.

`erased.safetensors` holds the float32 *difference* student - base of each selected tensor as `difference.` and its
denoiser parameter name, or the factors of that difference where an adapter was trained (`esd.lora`), and provenance
as JSON in the header. Differences, because they say what was erased and can be checked against their base; float32,
because a difference rounded to bf16 loses a third of what absolute bf16 weights lose. No stored name is one of a
stock module, for `load_state_dict` would take differences for weights.

Nothing is ever half applied: another base, unknown names, wrong shapes, a damaged file or a second
application are refused before the first weight changes. A silent no-op is the worst thing a file of weights
can do.

The base is known by its *fingerprint*: a few values of each selected tensor, compared at the coarser of the
two precisions. The same base in fp32, fp16 or bf16 is accepted; a fine-tune of it differs in some of
thousands of values.
"""

from __future__ import annotations

import base64
import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import UserError
from .families.base import Denoiser
from .lora import Lora, LowRank, peft_config
from .storage import atomic
from .weights import refuse_fused

FORMAT = "esd-difference-v1"
LORA_FORMAT = "esd-lora-v1"
FILE_NAME = "erased.safetensors"
LORA_NAME = "lora.safetensors"
_PREFIX = "difference."
_VALUES = 32  # of each tensor in a fingerprint
_MANTISSA = {"float32": 24, "float16": 11, "bfloat16": 8}


class CheckpointError(UserError):
    """A file of erased weights that cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class Erased:
    """A loaded checkpoint.

    Attributes:
        differences: student - base by denoiser parameter name, float32 on the CPU; a `LowRank` for an adapter.
        provenance: what the trainer wrote, and the base's "fingerprint".
        path: the file.
    """

    differences: Mapping[str, Tensor]
    provenance: dict[str, Any]
    path: Path

    def identity(self) -> dict[str, Any]:
        """What says which checkpoint was measured, ready for JSON."""
        content = self.path.read_bytes()
        told = {"path": str(self.path), "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        return told | {"concepts": self.provenance.get("concepts")}


@dataclass(frozen=True)
class _Applied:
    """Originals of a denoiser that wears a checkpoint, kept on the CPU."""

    path: Path
    originals: dict[str, Tensor]


_APPLIED: weakref.WeakKeyDictionary[nn.Module, _Applied] = weakref.WeakKeyDictionary()


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """What identifies these base tensors: precision and 32 evenly spaced values of each, ready for JSON."""
    prints = {}
    for name, tensor in tensors.items():
        values = _sample(tensor).numpy().astype("<f4").tobytes()
        prints[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "values": base64.b64encode(values).decode(),
        }
    return prints


def save(path: str | Path, differences: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Writes a checkpoint so that a reader sees the whole file or none.

    Args:
        path: the file; its directory is made if need be.
        differences: student - base by denoiser parameter name, or a `LowRank` of them; stored as float32.
        provenance: anything JSON can hold; must have "fingerprint", made by `fingerprint` from the base
            tensors.

    Raises:
        ValueError: no difference, one without a fingerprint, or one that is not finite.
    """
    if not differences or set(differences) != set(provenance.get("fingerprint", ())):
        raise ValueError("a checkpoint needs differences, and provenance['fingerprint'] for exactly those tensors")
    low = differences if isinstance(differences, LowRank) else None
    stored = low.tensors() if low else {_PREFIX + name: difference for name, difference in differences.items()}
    tensors = {name: d.detach().to("cpu", torch.float32).contiguous() for name, d in stored.items()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]!r} is not finite; such weights draw nothing")
    header = {
        "format": LORA_FORMAT if low else FORMAT,
        "provenance": json.dumps(dict(provenance), sort_keys=True),
    }
    if low:
        header["lora"] = json.dumps(asdict(low.lora))
    header["sha256"] = _digest(tensors, header)
    with atomic(Path(path)) as staged:
        save_file(tensors, staged, metadata=header)


def load(path: str | Path) -> Erased:
    """The checkpoint in a file, or in a run directory that holds one.

    Raises:
        CheckpointError: nothing there, not such a file, or a damaged one.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise CheckpointError(
            f"checkpoint is {str(path)!r}; there is no file {file.name!r} there; give a file or a run directory"
        )
    try:
        with safe_open(file, framework="pt") as handle:
            header = handle.metadata() or {}
            if header.get("format") not in (FORMAT, LORA_FORMAT):
                raise CheckpointError(
                    f"{str(path)!r} has format {header.get('format')!r}; only {FORMAT!r} and {LORA_FORMAT!r}, as "
                    "esd.train writes them, can be applied"
                )
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}; copy or train it again") from error
    if header.get("sha256") != _digest(tensors, header):
        raise CheckpointError(f"{str(path)!r} is damaged: the checksum does not match; copy or train it again")
    try:
        provenance = json.loads(header["provenance"])
        adapter = Lora(**json.loads(header["lora"])) if header["format"] == LORA_FORMAT else None
        whole = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
        differences = LowRank.of_tensors(tensors, adapter) if adapter else whole
        if {name: _known(told) for name, told in provenance["fingerprint"].items()}.keys() != differences.keys():
            raise ValueError("its fingerprint is of other tensors")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: its header is not what esd.train writes ({error!r}); train it again"
        ) from error
    return Erased(differences, provenance, file)


def check(pipe: Any, path: str | Path | Erased) -> None:
    """Makes sure that erased weights could be put on a pipeline; changes nothing.

    Raises:
        CheckpointError: see `apply`.
    """
    _fitting(_loaded(path), _denoiser(pipe))


def apply(pipe: Any, path: str | Path | Erased) -> None:
    """Puts erased weights on a pipeline's denoiser, in place and in its own precision; `remove` undoes it.

    Args:
        pipe: a diffusers pipeline, or a denoiser itself.
        path: a checkpoint file, a run directory, or what `load` made of one.

    Raises:
        CheckpointError: not readable, made from another base, for another architecture, or the pipeline
            wears one.
        UserError: the denoiser's projections are fused.
    """
    denoiser, checkpoint = _denoiser(pipe), _loaded(path)
    parameters = _fitting(checkpoint, denoiser)
    originals = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
    erased_weights = _erased_weights(checkpoint, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(erased_weights[name])
    _APPLIED[denoiser] = _Applied(checkpoint.path, originals)


def remove(pipe: Any) -> None:
    """Puts the kept originals back, bit for bit (w + d - d is not w).

    Raises:
        CheckpointError: the pipeline wears no checkpoint, or an adapter hides a parameter; nothing changed
            then, and it can be called again.
    """
    denoiser = _denoiser(pipe)
    originals, parameters = _originals(denoiser), dict(denoiser.named_parameters())
    if gone := [name for name in originals if name not in parameters]:
        raise CheckpointError(
            f"{type(denoiser).__name__} no longer has {gone[0]!r}, which erased weights are on; unload adapters "
            "first (pipe.unload_lora_weights()), then call esd.remove(pipe) again"
        )
    with torch.no_grad():
        for name, original in originals.items():
            parameters[name].copy_(original)
    del _APPLIED[denoiser]


@contextmanager
def erased(pipe: Any, path: str | Path | Erased) -> Iterator[Any]:
    """The pipeline with erased weights on, for the length of a `with` block; they come off on any exit."""
    apply(pipe, path)
    try:
        yield pipe
    finally:
        remove(pipe)


def originals(pipe: Any) -> Mapping[str, Tensor]:
    """The base's parameters under erased weights, by name, on the CPU; not to be changed.

    Raises:
        CheckpointError: the pipeline wears none.
    """
    return _originals(_denoiser(pipe))


def base_view(pipe: Any) -> Denoiser:
    """The base under erased weights, callable like the denoiser and beside it; changes nothing, gradients flow.

    The kept originals follow the denoiser from device to device. Not for a denoiser under gradient checkpointing: the
    backward pass would compute again with the erased weights.

    Args:
        pipe: a pipeline, or a denoiser, that wears a checkpoint.

    Raises:
        CheckpointError: it wears none.
    """
    denoiser = _denoiser(pipe)
    originals = dict(_originals(denoiser))

    def base(*args: Any, **kwargs: Any) -> Any:
        live = dict(denoiser.named_parameters())
        for name, value in originals.items():
            originals[name] = value.to(live[name].device)
        return torch.func.functional_call(denoiser, originals, args, kwargs)

    return base


def export_official(path: str | Path | Erased, pipe: Any, out: str | Path) -> None:
    """Writes absolute weights under bare denoiser names, in the pipeline's precision, as upstream's scripts
    do.

    ``pipe.unet.load_state_dict(load_file(out), strict=False)`` is all a reader needs.

    Args:
        path: a checkpoint file, a run directory, or what `load` made of one.
        pipe: the base it was made from, with no erased weights on.
        out: file to write.

    Raises:
        CheckpointError: see `apply`.

    Source: rohitgandikota/erasing, esd_sd.py, whose files these load like.
    """
    checkpoint = _loaded(path)
    weights = _erased_weights(checkpoint, _fitting(checkpoint, _denoiser(pipe)))
    header = {"format": "pt", "provenance": json.dumps(checkpoint.provenance, sort_keys=True)}
    with atomic(Path(out)) as staged:
        save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, staged, metadata=header)


def write_lora(pipe: Any, differences: LowRank, out: Path) -> None:
    """Writes an adapter as `pipe.load_lora_weights` of the stock pipeline reads it.

    Args:
        pipe: of the base; says how diffusers names the parts.
        differences: of its denoiser.
        out: file to write, `.safetensors`.
    """
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    config = peft_config(differences.lora, differences)
    stored = {f"{part}_lora_layers": differences.tensors(), f"{part}_lora_adapter_metadata": config.to_dict()}
    with atomic(out) as staged, TemporaryDirectory(dir=out.parent, prefix=f".{out.name}") as folder:
        pipe.save_lora_weights(folder, weight_name=out.name, **stored)
        Path(folder, out.name).replace(staged)


def _originals(denoiser: nn.Module) -> dict[str, Tensor]:
    """The base's parameters under erased weights; raises CheckpointError where a denoiser wears none."""
    if denoiser not in _APPLIED:
        raise CheckpointError("the pipeline wears no erased weights; esd.apply(pipe, path) puts some on")
    return _APPLIED[denoiser].originals


def _loaded(path: str | Path | Erased) -> Erased:
    """The checkpoint at a path; one that is loaded is not read again."""
    return path if isinstance(path, Erased) else load(path)


def _erased_weights(checkpoint: Erased, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Base + difference, summed in float32, in each parameter's own precision and place."""
    return {
        name: (p.detach().float() + checkpoint.differences[name].to(p.device)).to(p.dtype)
        for name, p in parameters.items()
    }


def _fitting(checkpoint: Erased, denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint changes, after making sure that this is its base and wears nothing."""
    refuse_fused(denoiser)
    if denoiser in _APPLIED:
        raise CheckpointError(
            f"the pipeline already wears {str(_APPLIED[denoiser].path)!r}; call esd.remove(pipe) first"
        )
    parameters, file = dict(denoiser.named_parameters()), checkpoint.path.name
    for name, difference in checkpoint.differences.items():
        if name not in parameters:
            layer, _, leaf = name.rpartition(".")
            wears = f"{layer}.base_layer.{leaf}" in parameters  # as PEFT renames it
            mend = "unload adapters first" if wears else f"use the base it was made from: {_base(checkpoint)}"
            raise CheckpointError(f"{file} holds {name!r}, which {type(denoiser).__name__} does not have; {mend}")
        if parameters[name].shape != difference.shape:
            raise CheckpointError(
                f"{file} holds {name!r} of shape {tuple(difference.shape)}, the model's is "
                f"{tuple(parameters[name].shape)}; use the base it was made from: {_base(checkpoint)}"
            )
    chosen = {name: parameters[name] for name in checkpoint.differences}
    for name, known in checkpoint.provenance["fingerprint"].items():
        if not _same(known, chosen[name]):
            raise CheckpointError(
                f"{file} was made from another base: {name!r} differs; use the one it was made from: "
                f"{_base(checkpoint)}"
            )
    return chosen


def _same(known: Mapping[str, str], tensor: Tensor) -> bool:
    """Whether a tensor agrees with its fingerprint at the coarser of the two precisions."""
    then, now = _known(known), _sample(tensor)
    kinds = (known["dtype"], str(tensor.dtype).removeprefix("torch."))
    coarse: torch.dtype = getattr(torch, min(kinds, key=lambda kind: _MANTISSA.get(kind, 24)))
    then, now = then.to(coarse).float(), now.to(coarse).float()
    if set(kinds) == {"float16", "bfloat16"}:  # rounded twice on one side: one unit in bf16's last place
        return torch.allclose(then, now, rtol=2.0**-7, atol=2.0**-24)
    return torch.equal(then, now)


def _known(told: Mapping[str, str]) -> Tensor:
    """The values (k,) of one tensor's fingerprint, float32.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    if not isinstance(getattr(torch, told["dtype"]), torch.dtype):
        raise ValueError(f"{told['dtype']!r} is no precision")
    return torch.from_numpy(np.frombuffer(base64.b64decode(told["values"], validate=True), "<f4").copy())


def _sample(tensor: Tensor) -> Tensor:
    """Up to 32 evenly spaced values (k,), float32 on the CPU."""
    count = min(tensor.numel(), _VALUES)
    places = torch.arange(count, device=tensor.device) * tensor.numel() // count
    return tensor.detach().flatten()[places].float().cpu()


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of the header's other entries and of names, shapes and values; a file's bytes depend on their order."""
    told = {name: text for name, text in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _denoiser(pipe: Any) -> nn.Module:
    """The UNet or transformer of a pipeline, or the module itself."""
    if isinstance(pipe, nn.Module):
        return pipe
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, nn.Module):
        raise CheckpointError(f"{type(pipe).__name__} has neither a unet nor a transformer; give a diffusers pipeline")
    return denoiser


def _base(checkpoint: Erased) -> str:
    """How the provenance names the base, and its commit where it has one."""
    told = checkpoint.provenance
    return f"{told.get('base', 'unknown')}" + (f" at {told['revision']}" if told.get("revision") else "")
