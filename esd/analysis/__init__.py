"""What goes on inside a model while it draws: analyses that end in figures, tables and a line on what is seen.

Each analysis is a module with a function `analyse(subject, results, **settings)`, made of small functions that can be
used on their own. From a pipeline to a figure:

    from esd.analysis import Results, Subject, layers
    from esd.config.analyses import LayersConfig
    from esd.families import family_of

    subject = Subject(family_of(pipe), num_steps=20, guidance_scale=4.0)
    settings = LayersConfig(["a cat"], ["a dog"], ["a cat in mosaic style"], pictures=1, lengths=[1])
    layers.analyse(subject, Results("out"), **vars(settings))

A folder of results is one analysis' of one model under one set of settings: others are refused there.
"""

from .results import Results
from .subject import Subject

__all__ = ["Results", "Subject"]
