"""The console script: `esd NAME ...` is the same as `python -m esd.NAME ...`."""

from __future__ import annotations

import sys
from importlib import import_module

PROGRAMS = {
    "train": "erase concepts from a model",
    "generate": "draw prompts with a base and its erased model, side by side",
    "evaluate": "have judges read what a base and its erased model draw",
    "analyze": "look inside a base and its erased model: layers, attention, what was changed where",
    "report": "make one HTML file of finished runs, to look at",
    "compare": "set finished runs side by side, and hold them to bounds",
    "files": "inspect and export erased checkpoints",
}


def main() -> None:
    """Runs the program named by the first argument with the arguments after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print("usage: esd PROGRAM ...\n")
        print("\n".join(f"  {program:<10} {meaning}" for program, meaning in PROGRAMS.items()))
        print("\nesd PROGRAM --help tells more; esd PROGRAM is the same as python -m esd.PROGRAM.")
        return
    if name not in PROGRAMS:
        print(f"error: esd has no program {name!r}; allowed: {', '.join(PROGRAMS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"esd {name}", *sys.argv[2:]]
    import_module(f"esd.{name}").main()


if __name__ == "__main__":
    main()
