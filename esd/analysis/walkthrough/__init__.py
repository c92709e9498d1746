"""One walk through a diffusion model: its schedule, its sampler, what it draws on the way, and how to steer it.

`solvers` has the schedule and samplers as solvers of an equation, `drawing` pictures on the way and under guidance,
`words` what becomes of words; `study` makes the figures.
"""

from .drawing import between, blueness, guided_by, img2img, strips, walk
from .solvers import errors, schedule, solve
from .study import analyse
from .words import Learning, drawings, input_embeddings, learn, swapped, with_new_word

__all__ = [
    "Learning", "analyse", "between", "blueness", "drawings", "errors", "guided_by", "img2img",
    "input_embeddings", "learn", "schedule", "solve", "strips", "swapped", "walk", "with_new_word",
]  # fmt: skip
