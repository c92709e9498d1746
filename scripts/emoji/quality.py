"""How well the bundled model draws, as the judge reads it, and contact sheets to look at.

    python scripts/emoji/quality.py             # ~8 minutes on two cores; last line is JSON
    python scripts/emoji/quality.py --sheets docs/images/emoji-sd

One seed, phrasings kept from training: every thing in every style; scenes of two things, both halves right; the pairs
that training never saw, thing and style right; and prompts that imply a thing by a synonym or name its kind, where any
thing of that kind is right. A picture counts only if the judge is sure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from catalogue import HYPERNYMS, MEMBERS, PHRASINGS, STYLES, THINGS
from diffusers import StableDiffusionPipeline
from drawings import DATA
from files import Refused, arguments, counted
from pages import held_out_pairs, without_article
from PIL import Image, ImageDraw
from training import DEVICE

from esd.errors import UserError
from esd.evaluation.generate import sample
from esd.evaluation.judges import EmojiJudge, load_judge
from esd.evaluation.prompts import say

Cell = tuple[int, int, str]
"""A thing in a style, and the prompt that asks for it."""
Scene = tuple[int, int, int, str]
"""What is on the left and on the right, the style, and the prompt."""

HELD = PHRASINGS["held_out"]
MODEL = DATA.parents[1] / "checkpoints" / "emoji-sd"
BATCH = 64
Item = TypeVar("Item")


def grid() -> list[Cell]:
    """Return every thing in every style; phrasings alternate."""
    return [
        (t, s, say(HELD["both"][(t + s) % len(HELD["both"])], {"thing": thing.name, "style": style}))
        for t, thing in enumerate(THINGS)
        for s, style in enumerate(STYLES)
    ]


def implied() -> list[tuple[int, str]]:
    """Return (thing, prompt) for every synonym of every thing."""
    return [(t, say(HELD["thing"][0], {"thing": word})) for t, thing in enumerate(THINGS) for word in thing.synonyms]


def kinds() -> list[tuple[str, str]]:
    """Return (group, prompt) for every word for a group of things, in every style."""
    phrasing = without_article(HELD["both"][0], "thing")
    return [
        (group, say(phrasing, {"thing": word, "style": style}))
        for group, words in HYPERNYMS.items()
        for word in words
        for style in STYLES
    ]


def scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Return scenes of two things, spread evenly over the styles."""
    out = []
    for i in range(count):
        first, second = (int(t) for t in rng.choice(len(THINGS), 2, replace=False))
        style = i % len(STYLES)
        names = {"first": THINGS[first].name, "second": THINGS[second].name}
        out.append((first, second, style, say(HELD["scene"][0], {"style": STYLES[style], **names})))
    return out


def some(items: list[Item], every: int) -> list[Item]:
    """Return one in `every` of the items, in order; drawn at random, so that none of what repeats in them is missed."""
    order = np.random.default_rng(0).permutation(len(items))
    return [items[i] for i in sorted(order[: -(-len(items) // every)])]


def unseen(cells: list[Cell]) -> np.ndarray:
    """Return (n,) bool: whether training never saw the pair."""
    pairs = held_out_pairs()
    return np.array([(thing, style) in pairs for thing, style, _ in cells])


def share(right: np.ndarray) -> float | None:
    """Return the share that is right, to four digits; None of nothing."""
    return round(float(right.mean()), 4) if len(right) else None


def painter(args: argparse.Namespace) -> Callable[[list[str], int], np.ndarray]:
    """Return what draws prompts, uint8 (n, 64, 64, 3), with the seed of the whole call."""
    pipe = StableDiffusionPipeline.from_pretrained(args.model).to(args.device)

    def paint(prompts: list[str], seed: int) -> np.ndarray:
        parts = [np.zeros((0, 64, 64, 3), np.uint8)]
        seeds = [seed * 1_000_000 + i for i in range(len(prompts))]
        how = {"num_steps": args.steps, "guidance_scale": args.guidance, "batch_size": BATCH}
        for start in counted(range(0, len(prompts), BATCH), f"pictures, in batches of {BATCH}"):
            here = slice(start, start + BATCH)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
                parts.append(sample(pipe, prompts[here], seeds[here], **how))
        return np.concatenate(parts)

    return paint


def judge_of(model: Path) -> EmojiJudge:
    """Return the judge of a published model; refuse a folder that is none or names no judge."""
    if not (model / "model_index.json").is_file():
        raise Refused(f"--model {model} holds no pipeline; name a published one, such as checkpoints/emoji-sd")
    try:
        judge = load_judge(model)
    except UserError as error:
        raise Refused(str(error)) from error
    if judge is None:
        raise Refused(f"{model / 'vocabulary.json'} names no judge; name a model whose vocabulary does")
    return judge


def print_grid(cells: list[Cell], thing_right: np.ndarray, style_right: np.ndarray) -> None:
    """Print the rates of every style, and the things that are drawn worst."""
    for s, style in enumerate(STYLES):
        here = np.array([cell[1] == s for cell in cells])
        if here.any():  # a quick look may pass a style over
            print(f"{style:14s} things {thing_right[here].mean():.1%}  style {style_right[here].mean():.1%}")
    worst = sorted(
        (np.mean([r for r, c in zip(thing_right, cells, strict=True) if c[0] == t] or [1]), thing.name)
        for t, thing in enumerate(THINGS)
    )[:12]
    print("hardest things:", ", ".join(f"{name} {rate:.0%}" for rate, name in worst))


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
    save(page, path)


def labelled_sheet(path: Path, labels: list[str], images: np.ndarray, across: int = 8) -> None:
    """Write a contact sheet of any number of images (n, 64, 64, 3), each over its label of up to three lines."""
    width, height, margin = 90, 112, 13
    page = Image.new("RGB", (width * across, height * -(-len(labels) // across)), "white")
    draw = ImageDraw.Draw(page)
    for i, label in enumerate(labels):
        x, y = i % across * width, i // across * height
        page.paste(Image.fromarray(images[i]), (x + margin, y))
        draw.multiline_text((x + width // 2, y + 66), label, fill="black", anchor="ma", align="center", spacing=2)
    save(page, path)


def save(page: Image.Image, path: Path) -> None:
    """Write a sheet, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, quality=85)


def grid_sheets(folder: Path, cells: list[Cell], images: np.ndarray) -> None:
    """Write every thing in every style, 36 things a sheet, and the pairs that training never saw."""
    for part in range(0, len(THINGS), 36):
        names = [t.name for t in THINGS[part : part + 36]]
        here = images[part * len(STYLES) : (part + 36) * len(STYLES)]
        sheet(folder / f"things-{part // 36 + 1}.jpg", names, list(STYLES), here)
    labels = [f"{THINGS[t].name}\n{STYLES[s]}" for t, s, _ in cells]
    shown = np.flatnonzero(unseen(cells))
    labelled_sheet(folder / "unseen-pairs.jpg", [labels[i] for i in shown], images[shown])


def scene_sheet(folder: Path, pages: list[Scene], images: np.ndarray) -> None:
    """Write the scenes, each over its left thing, its right thing and its style."""
    labels = [f"{THINGS[left].name},\n{THINGS[right].name}\n{STYLES[style]}" for left, right, style, _ in pages]
    labelled_sheet(folder / "scenes.jpg", labels, images, across=len(STYLES))


def command_line() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="only one picture in n of the grid: a quick look")
    parser.add_argument("--sheets", type=Path, help="folder for the contact sheets")
    parser.add_argument("--device", default=DEVICE)
    args = arguments(parser)
    if args.every < 1:
        raise Refused(f"--every is {args.every}; give 1 for the whole grid, or more for a part of it")
    if args.sheets and args.every > 1:
        raise Refused(f"--sheets show the whole grid, --every {args.every} draws a part of it; give one of them")
    return args


def main() -> None:
    """Draw, read, print, and write the sheets if asked to."""
    args = command_line()
    judge, paint = judge_of(args.model), painter(args)

    cells = some(grid(), args.every)
    images = paint([prompt for *_, prompt in cells], args.seed)
    readings = judge(images)
    thing_right = readings.shows([THINGS[t].name for t, _, _ in cells])
    style_right = readings.in_style([STYLES[s] for _, s, _ in cells])
    print_grid(cells, thing_right, style_right)

    words = some(implied(), args.every)
    word_images = paint([prompt for _, prompt in words], args.seed + 1)
    implied_right = judge(word_images).shows([THINGS[t].name for t, _ in words])

    groups = some(kinds(), args.every)
    read = judge(paint([prompt for _, prompt in groups], args.seed + 3))
    members = {group: {THINGS[t].name for t in of} for group, of in MEMBERS.items()}
    kind_right = [
        read.names["thing"][i] in members[group] and not read.neither[i] for i, (group, _) in enumerate(groups)
    ]

    pages = scenes(args.scenes, np.random.default_rng(args.seed))
    scene_images = paint([prompt for *_, prompt in pages], args.seed + 2)
    left, right = judge.halves(scene_images)
    firsts, seconds = ([THINGS[page[side]].name for page in pages] for side in (0, 1))
    both_right = left.shows(firsts) & right.shows(seconds)

    if args.sheets:
        grid_sheets(args.sheets, cells, images)
        if pages:
            scene_sheet(args.sheets, pages, scene_images)
    shares = {
        "thing": share(thing_right),
        "style": share(style_right),
        "unseen_pairs": share((thing_right & style_right)[unseen(cells)]),
        "implied": share(implied_right),
        "hypernyms": share(np.array(kind_right)),
        "scenes": share(both_right),
    }
    print(json.dumps({**shares, "n": len(cells)}))


if __name__ == "__main__":
    main()
