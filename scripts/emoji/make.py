"""Make the bundled models from nothing: every stage, in order.

    python scripts/emoji/make.py                # data/emoji/ and then checkpoints/
    python scripts/emoji/make.py --from judge   # begin at a stage
    python scripts/emoji/make.py --from unet --start checkpoints/emoji-sd --device cpu   # options of trained stages

Each stage is a program of its own that resumes from its state, so the same command goes on where it was stopped.
Drawings and pool that are there are kept if they are of today's catalogue; run drawings.py or pool.py to redraw them.
Hours on two cores, minutes on a GPU.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from drawings import DATA
from files import Refused
from pages import Drawings
from pool import Pool

HERE = Path(__file__).resolve().parent
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STAGES: dict[str, list[str]] = {
    "drawings": ["drawings.py"],
    "pool": ["pool.py"],
    "clip": ["train_clip.py"],
    "vae": ["train_vae.py"],
    "judge": ["train_judge.py"],
    "unet": ["train_unet.py"],
    "clip-locked": ["train_clip.py", "--text", "{data}/text"],
    "publish": ["publish.py"],
}


def run(command: list[str]) -> int:
    """Run a stage and return its status; signals go on to it, so that it saves before it leaves.

    It has a session of its own: a Ctrl-C at the terminal reaches it through here alone, and once.
    """
    heard: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        for child in children:
            child.send_signal(number)

    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's SIGHUP is not
    before = {number: signal.signal(number, pass_on) for number in heeded}
    try:
        child = subprocess.Popen(command, start_new_session=True)
        children.append(child)
        for number in heard:  # while it was being started
            child.send_signal(number)
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def drawn(name: str, data: Path) -> bool:
    """Return whether the stage drew what is there, whole and of today's catalogue: drawings, or a pool of these."""
    try:
        drawings = Drawings(data / "drawings.npz")
        return name == "drawings" or Pool.load(data / "pool.npz").drawings == drawings.digest()
    except Refused:
        return False


def command_of(name: str, data: Path, start: Path | None, options: list[str]) -> list[str]:
    """Return a stage's command line; `options` are for trained stages, `start` for those that have not begun."""
    script, *words = STAGES[name]
    command = [sys.executable, str(HERE / script), "--data", str(data), *(word.format(data=data) for word in words)]
    if script.startswith("train_"):
        command += options
        if start and not (data / "state" / name / "state.safetensors").exists():
            command += ["--start", str(start)]
    return command


def main() -> None:
    """Run the stages one after the other; stop at the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--from", dest="first", choices=STAGES, default="drawings")
    parser.add_argument("--start", type=Path, help="a published pipeline from which stages without a state begin")
    args, options = parser.parse_known_args()
    names = list(STAGES)
    for name in names[names.index(args.first) :]:
        if name in ("drawings", "pool") and drawn(name, args.data):
            print(f"== {name}: there already", flush=True)
            continue
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        status = run(command_of(name, args.data, args.start, options))
        if status:
            print(f"make: {name} stopped with status {status}; run again with --from {name}", file=sys.stderr)
            sys.exit(status if status > 0 else 128 - status)
        print(f"== {name}: {(time.perf_counter() - started) / 60:.1f} min", flush=True)
    print("now measure: python scripts/emoji/quality.py")


if __name__ == "__main__":
    main()
