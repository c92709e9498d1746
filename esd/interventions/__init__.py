"""Interventions on a model while it samples: record, leave out, weigh, patch, inject, edit attention, graft weights.

`attach(family, *ops)` puts ops in force on a stock pipeline; `sample` draws under ops by this package's own rollout.
`sites.resolve` says where an expression takes hold. Base and erased models, UNets and transformers are treated alike.
"""

from .clock import Moment
from .graft import Graft
from .hooks import Call, Op, SiteOp, Source, attach
from .record import Record, Recording
from .sampling import Drawn, sample
from .sites import Site, blocks, layers, resolve
from .streams import CrossSeed, InjectText, Patch, Scale, Skip, Transplant

__all__ = [
    "Call", "CrossSeed", "Drawn", "Graft", "InjectText", "Moment", "Op", "Patch", "Record", "Recording", "Scale",
    "Site", "SiteOp", "Skip", "Source", "Transplant", "attach", "blocks", "layers", "resolve", "sample",
]  # fmt: skip
