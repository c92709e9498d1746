"""A pool of drawn pages, made once and shared by every stage: pictures, and what each shows.

python scripts/emoji/pool.py                # -> data/emoji/pool.npz
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from catalogue import STYLES, THINGS
from drawings import DATA
from files import Refused, arguments, arrays, counted, digest, need, whole
from pages import PIXELS, Drawings, Page, draw_page, held_out_pairs, random_page


@dataclass(frozen=True)
class Pool:
    """Pages as arrays: images uint8 (n, 64, 64, 3); first, second (-1 where there is one thing), style int16 (n,).

    `drawings` is the hash of the drawings they were drawn from.
    """

    images: np.ndarray
    first: np.ndarray
    second: np.ndarray
    style: np.ndarray
    drawings: str

    @staticmethod
    def load(path: Path) -> Pool:
        """Return the pool stored at `path`; refuse one of other things or styles."""
        known = names()
        stored = arrays(path, "pool.py", ("images", "first", "second", "style", "drawings", *known))
        if any(list(stored.pop(kind)) != told for kind, told in known.items()):
            raise Refused(f"{path} shows other things or styles than catalogue.py lists; run pool.py again")
        return Pool(**{**stored, "drawings": str(stored["drawings"])})

    def save(self, path: Path) -> None:
        """Write the pool with the names of the things and styles that its numbers stand for."""
        with whole(path) as partial:
            np.savez(partial, **vars(self), **names())

    def page(self, index: int) -> Page:
        """Return what page `index` shows."""
        second = int(self.second[index])
        return Page((int(self.first[index]),) + ((second,) if second >= 0 else ()), int(self.style[index]))

    def digest(self) -> str:
        """Return the hash of all that the pool holds."""
        return digest(np.ascontiguousarray(a).data for a in (self.images, self.first, self.second, self.style))

    def __len__(self) -> int:
        return len(self.images)


def names() -> dict[str, list[str]]:
    """Return the things and the styles of the catalogue, in order."""
    return {"things": [t.name for t in THINGS], "styles": list(STYLES)}


def bytes_of(variants: int, scenes: int) -> int:
    """Return how much room the pool takes, a little more for its labels."""
    return (variants * len(THINGS) * len(STYLES) + scenes) * (PIXELS * PIXELS * 3 + 64)


def build(drawings: Drawings, *, variants: int, scenes: int, seed: int) -> Pool:
    """Draw `variants` pages of every trained (thing, style) pair and `scenes` pages of two things."""
    unseen = held_out_pairs()
    pairs = [(t, s) for t in range(len(THINGS)) for s in range(len(STYLES)) if (t, s) not in unseen]
    pages = [Page((thing,), style) for thing, style in pairs for _ in range(variants)]
    rng = np.random.default_rng(seed)
    pages += [random_page(rng, scenes=1.0, unseen=unseen) for _ in range(scenes)]
    numbered = counted(list(enumerate(pages)), "pool")
    images = np.stack([draw_page(drawings, page, np.random.default_rng((seed, i))) for i, page in numbered])
    columns = np.array([(*(*p.things, -1)[:2], p.style) for p in pages], np.int16)
    return Pool(images, columns[:, 0], columns[:, 1], columns[:, 2], drawings.digest())


def main() -> None:
    """Draw the pool and publish it by renaming."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--variants", type=int, default=10)
    parser.add_argument("--scenes", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=0)
    args = arguments(parser)
    for name in ("variants", "scenes"):
        if (asked := getattr(args, name)) < 1:
            raise Refused(f"--{name} is {asked}; later stages learn from pages of one thing and of two: give 1 or more")
    need(args.data, bytes_of(args.variants, args.scenes))
    pool = build(Drawings(args.data / "drawings.npz"), variants=args.variants, scenes=args.scenes, seed=args.seed)
    pool.save(args.data / "pool.npz")
    print(f"{len(pool)} pages are in {args.data / 'pool.npz'}")


if __name__ == "__main__":
    main()
