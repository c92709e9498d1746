"""How well the bundled model draws, as the judge reads it, and contact sheets to look at.

    python scripts/emoji/quality.py             # ~6 minutes on two cores; last line is JSON
    python scripts/emoji/quality.py --sheets docs/images/emoji-sd

One seed, phrasings kept from training: every thing in every style; scenes of two things, both halves right; the pairs
that training never saw; and prompts that imply a thing by another word. A picture counts only if the judge is sure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from catalogue import PHRASINGS, STYLES, THINGS
from diffusers import StableDiffusionPipeline
from drawings import DATA
from pages import held_out_pairs
from PIL import Image, ImageDraw

from esd.evaluation.generate import sample
from esd.evaluation.judges import load_judge
from esd.evaluation.prompts import say

HELD = PHRASINGS["held_out"]
MODEL = DATA.parents[1] / "checkpoints" / "emoji-sd"


def grid() -> list[tuple[int, int, str]]:
    """Return (thing, style, prompt) for every pair; phrasings alternate."""
    return [
        (t, s, say(HELD["both"][(t + s) % len(HELD["both"])], {"thing": thing.name, "style": style}))
        for t, thing in enumerate(THINGS)
        for s, style in enumerate(STYLES)
    ]


def implied() -> list[tuple[int, str]]:
    """Return (thing, prompt) for every synonym of every thing."""
    return [(t, say(HELD["thing"][0], {"thing": word})) for t, thing in enumerate(THINGS) for word in thing.synonyms]


def scenes(count: int, rng: np.random.Generator) -> list[tuple[int, int, int, str]]:
    """Return (left, right, style, prompt) of two-thing scenes, spread evenly over the styles."""
    out = []
    for i in range(count):
        first, second = (int(t) for t in rng.choice(len(THINGS), 2, replace=False))
        style = i % len(STYLES)
        names = {"first": THINGS[first].name, "second": THINGS[second].name}
        out.append((first, second, style, say(HELD["scene"][0], {"style": STYLES[style], **names})))
    return out


def sheet(path: Path, rows: list[str], columns: list[str], images: np.ndarray) -> None:
    """Write a contact sheet: images (rows * columns, 64, 64, 3) with names at the margins."""
    side, left, top = 64, 84, 16
    page = Image.new("RGB", (left + side * len(columns), top + side * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for c, name in enumerate(columns):
        draw.text((left + c * side + 3, 2), name, fill="black")
    for r, name in enumerate(rows):
        draw.text((3, top + r * side + 26), name, fill="black")
        for c in range(len(columns)):
            page.paste(Image.fromarray(images[r * len(columns) + c]), (left + c * side, top + r * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True)


def main() -> None:
    """Draw, read, print, and write the sheets if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="only every n-th picture of the grid: a quick look")
    parser.add_argument("--sheets", type=Path, help="folder for the contact sheets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(args.model).to(args.device)
    judge = load_judge(args.model)
    assert judge is not None, f"{args.model} names no judge"

    def pictures(prompts: list[str], seed: int) -> np.ndarray:
        seeds = [seed * 1_000_000 + i for i in range(len(prompts))]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            return sample(pipe, prompts, seeds, num_steps=args.steps, guidance_scale=args.guidance, batch_size=64)

    cells = grid()[:: args.every]
    images = pictures([prompt for _, _, prompt in cells], args.seed)
    read = judge(images)
    thing_right = read.shows([THINGS[t].name for t, _, _ in cells])
    style_right = read.in_style([STYLES[s] for _, s, _ in cells])
    for s, style in enumerate(STYLES):
        here = np.array([cell[1] == s for cell in cells])
        print(f"{style:14s} things {thing_right[here].mean():.1%}  style {style_right[here].mean():.1%}")
    worst = sorted(
        (np.mean([r for r, c in zip(thing_right, cells, strict=True) if c[0] == t] or [1]), thing.name)
        for t, thing in enumerate(THINGS)
    )[:12]
    print("hardest things:", ", ".join(f"{name} {rate:.0%}" for rate, name in worst))
    unseen = np.array([(t, s) in held_out_pairs() for t, s, _ in cells])
    words = implied()[:: args.every]
    implied_right = judge(pictures([p for _, p in words], args.seed + 1)).shows([THINGS[t].name for t, _ in words])
    pages = scenes(args.scenes, np.random.default_rng(args.seed))
    scene_images = pictures([p for *_, p in pages], args.seed + 2)
    left, right = judge.halves(scene_images)
    names = [[THINGS[page[k]].name for page in pages] for k in (0, 1)]
    both = left.shows(names[0]) & right.shows(names[1])
    if args.sheets:
        if args.every == 1:
            for part in range(0, len(THINGS), 36):
                sheet(
                    args.sheets / f"things-{part // 36 + 1}.png",
                    [t.name for t in THINGS[part : part + 36]],
                    list(STYLES),
                    images[part * len(STYLES) : (part + 36) * len(STYLES)],
                )
            shown = [
                (THINGS[t].name, STYLES[s], images[i])
                for i, (t, s, _) in enumerate(cells)
                if (t, s) in held_out_pairs()
            ]
            shown = shown[: len(shown) // 6 * 6]
            sheet(
                args.sheets / "unseen-pairs.png",
                ["never trained"] * (len(shown) // 6),
                [""] * 6,
                np.stack([s[2] for s in shown]),
            )
        sheet(
            args.sheets / "scenes.png",
            [f"{a} {b}" for a, b in zip(names[0][::10], names[1][::10], strict=True)],
            list(STYLES),
            scene_images,
        )
    print(
        json.dumps(
            {
                "thing": round(float(thing_right.mean()), 4),
                "style": round(float(style_right.mean()), 4),
                "unseen_pairs": round(float(thing_right[unseen].mean()), 4) if unseen.any() else None,
                "implied": round(float(implied_right.mean()), 4),
                "scenes": round(float(both.mean()), 4),
                "n": len(cells),
            }
        )
    )


if __name__ == "__main__":
    main()
