"""What a user may set, what each setting means, and what it may be: the one place where input is checked.

A program's configuration is a tree of plain dataclasses: that of `python -m esd.NAME` stands in the module NAME here.
Every field carries its own help and its own range, so the same declaration types the YAML (Hydra reads these classes
as schemas), prints `--help` and refuses a bad value before any model is loaded. Nothing here imports torch or Hydra,
so `--help` costs no start-up time.
"""
