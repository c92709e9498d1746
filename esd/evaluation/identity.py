"""Whether two pipelines would draw the same: hashes of their weights, and of all that their parts are set to.

A folder of images and the images kept of a base are both told by these, so that what changes a picture has to change
one of them, also where it was changed in place, under the same name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

WHOLE = 2**14  # values up to which a tensor is taken whole
STRIDE = 61  # of a larger one, every so many values
ELSEWHERE = ("architectures", "dtype", "torch_dtype", "transformers_version")  # who wrote a configuration, and how
STATE = ("padding", "truncation")  # of a tokenizer, which its last call set


def digest(value: Any) -> str:
    """sha256 of a value as JSON; what JSON cannot hold, as scheduler settings may, by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def pipeline_hashes(pipe: Any) -> dict[str, str]:
    """What a pipeline that draws others differs in: its "scheduler", which is named too, "weights" or "settings"."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {
        "scheduler": f"{type(pipe.scheduler).__name__} {digest(scheduler)[:12]}",
        "weights": weights_hash({name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}),
        "settings": settings_hash(pipe),
    }


def weights_hash(parts: Mapping[str, nn.Module]) -> str:
    """sha256 of names, precisions, shapes and values of all parameters and buffers that are saved, in their precision.

    Of a tensor of more than 16384 values one in 61 is taken, as `flatten` orders them. So a change of 61 neighbouring
    values is seen wherever it is, as of a row of an embedding or of a projection, and so is training or merging; a
    change of single values among many may not be.

    Args:
        parts: of a pipeline, by name.
    """
    found = hashlib.sha256()
    for name, part in sorted(parts.items()):
        for key, tensor in sorted(part.state_dict().items()):
            if not isinstance(tensor, torch.Tensor):
                continue
            values = tensor.detach().flatten()[:: STRIDE if tensor.numel() > WHOLE else 1]
            found.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(values.contiguous().cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()


def settings_hash(pipe: Any) -> str:
    """sha256 of what a pipeline and its parts but the scheduler are set to, tokenizers with all that they know.

    Where they came from and in which precision does not count.

    Args:
        pipe: a stock pipeline.
    """
    parts = {name: part for name, part in pipe.components.items() if part is not None and part is not pipe.scheduler}
    own = {name: value for name, value in pipe.config.items() if name not in pipe.components}
    return digest(
        {"": [type(pipe).__name__, _plain(own)]}
        | {name: [type(part).__name__, _told(part)] for name, part in parts.items()}
    )


def _told(part: Any) -> Any:
    """What one part of a pipeline is set to."""
    if hasattr(part, "get_vocab"):
        return _tokenizer(part)
    told = part.config if hasattr(part, "config") else part
    return _plain(told.to_dict() if hasattr(told, "to_dict") else dict(told) if isinstance(told, Mapping) else None)


def _tokenizer(tokenizer: Any) -> Any:
    """What decides the tokens of a prompt: words, merges, what is done to a text before and after."""
    whole = getattr(tokenizer, "backend_tokenizer", None)
    told = json.loads(whole.to_str()) if whole is not None else tokenizer.get_vocab()
    names = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map", "chat_template")
    rules = {name: value for name, value in told.items() if whole is None or name not in STATE}
    return [rules, {name: getattr(tokenizer, name, None) for name in names}]


def _plain(told: Any) -> Any:
    """A configuration without what says where it came from; names that begin with _ are the libraries' own."""
    if not isinstance(told, Mapping):
        return told
    return {
        str(name): _plain(value)
        for name, value in told.items()
        if not str(name).startswith("_") and name not in ELSEWHERE
    }
