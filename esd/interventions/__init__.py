"""Interventions on a model while it samples: record, leave out, weigh, patch, inject, edit attention, graft weights.

`attach(family, *ops)` puts ops in force on a stock pipeline; `sample` draws under ops by this package's own rollout.
`sites.resolve` says where an expression takes hold. Base and erased models, UNets and transformers are treated alike.
"""

from .attention import AttentionEdit, AttentionMaps, Maps, Reweight
from .clock import Moment
from .graft import Graft
from .hooks import attach
from .latents import Guide, LocalBlend
from .ops import AttentionOp, Call, Latents, Op, Sampling, SiteOp, Source
from .probabilities import Attention
from .record import Record, Recording
from .sampling import Drawn, sample
from .sites import Site, blocks, layers, resolve
from .streams import CrossSeed, InjectText, Patch, Scale, Skip, Transplant
from .words import positions_of, token_texts

__all__ = [
    "Attention", "AttentionEdit", "AttentionMaps", "AttentionOp", "Call", "CrossSeed", "Drawn", "Graft", "Guide",
    "InjectText", "Latents", "LocalBlend", "Maps", "Moment", "Op", "Patch", "Record", "Recording", "Reweight",
    "Sampling", "Scale", "Site", "SiteOp", "Skip", "Source", "Transplant", "attach", "blocks", "layers",
    "positions_of", "resolve", "sample", "token_texts",
]  # fmt: skip
