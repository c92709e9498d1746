"""Make the bundled models from nothing: every stage, in order.

    python scripts/emoji/make.py                # data/emoji/ and then checkpoints/
    python scripts/emoji/make.py --from judge   # begin at a stage

Each stage is a program of its own that resumes from its state, so the same command goes on where it was stopped.
Hours on two cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from drawings import DATA

HERE = Path(__file__).resolve().parent
STAGES: dict[str, list[str]] = {
    "drawings": ["drawings.py"],
    "pool": ["pool.py"],
    "clip": ["train_clip.py"],
    "vae": ["train_vae.py"],
    "judge": ["train_judge.py"],
    "unet": ["train_unet.py"],
    "clip-locked": ["train_clip.py", "--steps", "1000", "--text", "{data}/text"],
    "publish": ["publish.py"],
}


def main() -> None:
    """Run the stages one after the other; stop at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--from", dest="first", choices=STAGES, default="drawings")
    args = parser.parse_args()
    names = list(STAGES)
    for name in names[names.index(args.first) :]:
        script, *options = [word.format(data=args.data) for word in STAGES[name]]
        print(f"== {name}: {script}", flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, str(HERE / script), "--data", str(args.data), *options])
        if done.returncode:
            sys.exit(f"make: {name} stopped with status {done.returncode}; mend it and run with --from {name}")
        print(f"== {name}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)
    print("now measure: python scripts/emoji/quality.py")


if __name__ == "__main__":
    main()
