"""Make the bundled models from nothing: every stage, in order.

    python scripts/emoji/make.py                # data/emoji/ and then checkpoints/
    python scripts/emoji/make.py --from judge   # begin at a stage

Each stage is a program of its own that resumes from its state, so the same command goes on where it was stopped.
Hours on two cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

from drawings import DATA

HERE = Path(__file__).resolve().parent
SIGNALS = (signal.SIGTERM, signal.SIGINT)
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


def run(command: list[str]) -> int:
    """Run a stage and return its status; SIGTERM and SIGINT go on to it, so that it saves before it leaves."""
    child = subprocess.Popen(command)
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in SIGNALS}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        status = run([sys.executable, str(HERE / script), "--data", str(args.data), *options])
        if status:
            print(f"make: {name} stopped with status {status}; run again with --from {name}", file=sys.stderr)
            sys.exit(status if status > 0 else 128 - status)
        print(f"== {name}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)
    print("now measure: python scripts/emoji/quality.py")


if __name__ == "__main__":
    main()
