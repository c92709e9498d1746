"""The judge: a CNN that reads thing and style, trained on drawings and their autoencoder round trips alone.

    python scripts/emoji/train_judge.py         # -> data/emoji/judge/
    python scripts/emoji/train_judge.py --examine   # no training: threshold and exam anew, on pages as drawn now
    python scripts/emoji/train_judge.py --start checkpoints/emoji-sd   # from the judge published beside that pipeline

It never sees a picture from the diffusion model. Drawings of things outside the list are shown with a uniform target
("outlier exposure", Hendrycks et al. 2019); the threshold under which it says "neither" is then set on *other* drawings
outside the list, on noise and on smears, so that 5% of them are taken for a thing. How many are taken is reported on
drawings, noise and smears of which it has seen none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from catalogue import STYLES, THINGS
from diffusers import AutoencoderKL
from files import Refused, counted, folder_digest, made_by, whole_folders
from pages import Drawings, Page, draw, draw_page, held_out_pairs, random_page
from pool import Pool
from safetensors.torch import save_file
from scipy import ndimage
from torch.nn import functional as F
from train_vae import to_model, to_pictures
from training import PUBLISHED, Origin, Recipe, Runs, Stage, adopt, begin, command_line, history, tell

from esd.evaluation.judges import EmojiJudge, JudgeNetwork, half

MAY_TAKE = 0.05
"""Share of pictures without a listed thing that is read as one at the threshold."""
SCENES, OUTSIDERS = 4000, 3000
"""How many scenes (each cut in two halves) and pictures of things outside the list the judge learns from."""
NEEDED = {"thing": 0.97, "style": 0.95}
"""Smallest share of things and of styles read right with which a judge may judge."""
EXAM_SEED = 4242


class Labelled(NamedTuple):
    """Pictures, uint8 (n, 64, 64, 3), with the thing and the style that each shows."""

    images: np.ndarray
    things: np.ndarray
    styles: np.ndarray


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return pictures (n, 64, 64, 3) shifted, scaled, blurred, noised and dimmed a little, each its own way."""
    out = np.empty_like(images)
    for i, image in enumerate(images):
        x = image.astype(np.float32)
        scale, shift = rng.uniform(0.85, 1.15), rng.uniform(-4, 4, 2)
        matrix = np.array([1 / scale, 1 / scale, 1.0])
        offset = np.array([32 - 32 / scale + shift[0], 32 - 32 / scale + shift[1], 0.0])
        if rng.random() < 0.7:
            x = ndimage.affine_transform(x, matrix, offset, order=1, mode="mirror")
        if rng.random() < 0.3:
            x = ndimage.gaussian_filter(x, (rng.uniform(0.2, 0.8),) * 2 + (0,))
        if rng.random() < 0.5:
            x += rng.normal(0, rng.uniform(1, 10), x.shape)
        x = (x - 128) * rng.uniform(0.9, 1.1) + 128 + rng.uniform(-10, 10)
        out[i] = np.clip(x, 0, 255)
    return out


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: np.ndarray, batch: int = 128) -> np.ndarray:
    """Return the pictures as the autoencoder gives them back."""
    parts = []
    for start in counted(range(0, len(images), batch), "round trips, in batches"):
        x = to_model(images[start : start + batch], vae.device)
        parts.append(to_pictures(vae.decode(vae.encode(x).latent_dist.mode()).sample))
    return np.concatenate(parts)


def outsiders(drawings: Drawings, numbers: range, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return styled pages of things outside the list."""
    pick = counted(rng.integers(len(numbers), size=count), "pages of other things")
    return np.stack([draw([drawings.others[numbers[int(i)]]], int(rng.integers(len(STYLES))), rng) for i in pick])


def shares(drawings: Drawings) -> list[range]:
    """Return which drawings outside the list are learned from, fix the threshold, and are reported on.

    Half, a quarter, a quarter; both drawings of an emoji are on the same side.
    """
    emojis = len(drawings.others) // 2
    return [range(start, stop) for start, stop in pairwise(2 * (emojis * quarter // 4) for quarter in (0, 2, 3, 4))]


def noise(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return noise, sharp and soft by turns."""
    out = np.empty((count, 64, 64, 3), np.uint8)
    for i in range(count):
        sharp = rng.normal(128, 60, (64, 64, 3))
        out[i] = np.clip(sharp if i % 2 else ndimage.gaussian_filter(sharp, (3, 3, 0)) * 4 - 384, 0, 255)
    return out


def smears(pool: Pool, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return heavy blurs of a drawing and blends of three, by turns."""
    out = np.empty((count, 64, 64, 3), np.uint8)
    for i in range(count):
        three = pool.images[rng.integers(len(pool), size=3)].astype(np.float32)
        out[i] = np.clip(three.mean(0) if i % 2 else ndimage.gaussian_filter(three[0], (6, 6, 0)), 0, 255)
    return out


def outside(drawings: Drawings, numbers: range, pool: Pool, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return pictures without a listed thing, by what they are."""
    return {
        "drawings": outsiders(drawings, numbers, rng, OUTSIDERS // 3),
        "smears": smears(pool, rng, OUTSIDERS // 16),
        "noise": noise(rng, OUTSIDERS // 16),
    }


def lessons(drawings: Drawings, pool: Pool, vae: AutoencoderKL, rng: np.random.Generator) -> Labelled:
    """Return what the judge learns: the pool, the pairs it lacks, and halves of scenes; a third of it round trips."""
    unseen = [Page((t,), s) for t, s in sorted(held_out_pairs()) for _ in range(16)]  # the judge must know every pair
    singles, scenes = np.flatnonzero(pool.second < 0), rng.choice(np.flatnonzero(pool.second >= 0), SCENES)
    drawn = np.stack([draw_page(drawings, page, rng) for page in counted(unseen, "pages of unseen pairs")])
    left, right = (half(pool.images[scenes], side) for side in (0, 1))
    images = np.concatenate([pool.images[singles], drawn, left, right])
    again = rng.choice(len(images), len(images) // 3, replace=False)
    images[again] = round_trip(vae, images[again])
    return Labelled(
        images,
        np.concatenate([pool.first[singles], [p.things[0] for p in unseen], pool.first[scenes], pool.second[scenes]]),
        np.concatenate([pool.style[singles], [p.style for p in unseen], pool.style[scenes], pool.style[scenes]]),
    )


def exam(drawings: Drawings, vae: AutoencoderKL, count: int = 3000) -> dict[str, Labelled]:
    """Return pages of one thing, and halves of scenes: drawn afresh and augmented, a third of them round trips."""
    rng = np.random.default_rng(EXAM_SEED)

    def drawn(scenes: float, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pages = [random_page(rng, scenes=scenes, unseen=frozenset()) for _ in range(number)]
        images = np.stack([draw_page(drawings, page, rng) for page in counted(pages, "pages of the exam")])
        images[::3] = round_trip(vae, images[::3])
        return images, np.array([page.things for page in pages]), np.array([page.style for page in pages])

    alone, things, styles = drawn(0.0, count)
    scenes, both, scene_styles = drawn(1.0, count // 4)
    halves = np.concatenate([half(scenes, side) for side in (0, 1)])
    return {
        "pages": Labelled(augment(alone, rng), things[:, 0], styles),
        "halves": Labelled(augment(halves, rng), both.T.ravel(), np.tile(scene_styles, 2)),
    }


def to_network(network: JudgeNetwork, images: np.ndarray) -> torch.Tensor:
    """Return uint8 (n, h, w, 3) as the network reads it, where the network is."""
    device = next(network.parameters()).device
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255


def loss_of_reading(network: JudgeNetwork, images: np.ndarray, things: np.ndarray, styles: np.ndarray) -> torch.Tensor:
    """Return the cross-entropy of the pictures that have labels, and of the rest against a uniform target."""
    x = to_network(network, images)
    with torch.autocast(x.device.type, torch.bfloat16):
        thing, style = network(x)
    thing, style, known = thing.float(), style.float(), len(things)
    right_thing, right_style = (torch.from_numpy(labels).long().to(x.device) for labels in (things, styles))
    loss = F.cross_entropy(thing[:known], right_thing, label_smoothing=0.02)
    loss = loss + F.cross_entropy(style[:known], right_style, label_smoothing=0.02)
    return loss - 0.5 * thing[known:].log_softmax(1).mean()


def reads(network: JudgeNetwork, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best thing, its probability and the best style of each picture."""
    network.eval()
    with torch.no_grad():
        logits = [network(to_network(network, images[i : i + batch])) for i in range(0, len(images), batch)]
    probability, thing = torch.cat([things.softmax(1) for things, _ in logits]).cpu().max(1)
    return thing.numpy(), probability.numpy(), torch.cat([styles for _, styles in logits]).argmax(1).cpu().numpy()


def examine(
    network: JudgeNetwork, asked: dict[str, Labelled], fixing: dict[str, np.ndarray], fresh: dict[str, np.ndarray]
) -> tuple[float, dict[str, float]]:
    """Return the threshold that few enough of `fixing` reach, and the figures of the exam.

    Figures on halves of scenes begin with "half"; `fresh` tells how many are taken that show no listed thing.
    """
    threshold = float(np.quantile(reads(network, np.concatenate(list(fixing.values())))[1], 1 - MAY_TAKE))
    figures: dict[str, float] = {}
    for prefix, labelled in (("", asked["pages"]), ("half_", asked["halves"])):
        thing, sure, style = reads(network, labelled.images)
        right = thing == labelled.things
        figures |= {
            f"{prefix}thing": float(right.mean()),
            f"{prefix}thing_and_sure": float((right & (sure >= threshold)).mean()),
            f"{prefix}style": float((style == labelled.styles).mean()),
            f"{prefix}n": len(labelled.images),
        }
    taken = {kind: reads(network, images)[1] >= threshold for kind, images in fresh.items()}
    figures["outside_taken"] = float(np.concatenate(list(taken.values())).mean())
    figures |= {f"{kind}_taken": float(sure.mean()) for kind, sure in taken.items()}
    return threshold, figures | {"n_outside": sum(map(len, taken.values()))}


def refuse_unfit(figures: dict[str, float]) -> None:
    """Refuse a judge that reads too few things or styles right."""
    for head, needed in NEEDED.items():
        if figures[head] < needed:
            raise Refused(
                f"the judge reads {figures[head]:.1%} of {head}s, below {needed:.0%}: it may not judge; raise --steps"
            )


def publish(network: JudgeNetwork, threshold: float, figures: dict[str, float], runs: Runs, data: Path) -> None:
    """Write the weights in half precision, the configuration that names them by their hash, and what made them."""
    weights = {k: v.half() if v.is_floating_point() else v for k, v in network.cpu().state_dict().items()}
    with whole_folders(data / "part.judge", data) as new:
        folder = new / "judge"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        config = {
            "version": "1",
            "threshold": round(threshold, 4),
            "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            "things": [t.name for t in THINGS],
            "styles": list(STYLES),
            "exam": figures,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        tell(folder, runs)


def published(folder: Path) -> JudgeNetwork:
    """Return a published judge's network; refuse one of other things or styles."""
    judge = EmojiJudge(made_by("train_judge.py", folder))
    if judge.things != tuple(t.name for t in THINGS) or judge.styles != STYLES:
        raise Refused(
            f"the judge in {folder} knows other things or styles than catalogue.py; train one without --start"
        )
    return judge.network


def new_stage(args: argparse.Namespace, drawings: Drawings, pool: Pool) -> Stage:
    """Return the judge's training, with a network that is new, as published, or as the state has it."""
    network = published(args.start / PUBLISHED["judge"]) if args.start else JudgeNetwork(len(THINGS), len(STYLES))
    often = {"save_every": 200, "report_every": 200}
    recipe = Recipe(args.steps, args.batch, args.lr, weight_decay=0.05, ema=0.0, seed=args.seed, **often)
    made_from = {"pool": pool.digest(), "drawings": drawings.digest(), "vae": folder_digest(args.data / "vae")}
    return Stage("judge", network.to(args.device), recipe, args.data, Origin.of(args, recipe, **made_from))


def train(stage: Stage, drawings: Drawings, pool: Pool, vae: AutoencoderKL, asked: Labelled) -> None:
    """Let a judge learn; `asked` is only for telling how far it is."""
    network, recipe, rng = stage.model, stage.recipe, np.random.default_rng(stage.recipe.seed)
    known = lessons(drawings, pool, vae, rng)
    unknown = outsiders(drawings, shares(drawings)[0], rng, OUTSIDERS)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        pick = rng.integers(len(known.images), size=recipe.batch)
        others = unknown[rng.integers(len(unknown), size=recipe.batch // 6)]
        nothing = (noise(rng, recipe.batch // 24), smears(pool, rng, recipe.batch // 24))
        shown = np.concatenate([known.images[pick], others, *nothing])
        return loss_of_reading(network, augment(shown, rng), known.things[pick], known.styles[pick])

    def report() -> str:
        thing, _, style = reads(network, asked.images)
        return f"things {(thing == asked.things).mean():.1%}, styles {(style == asked.styles).mean():.1%}"

    stage.run(loss_of, report)


def main() -> None:
    """Train, examine, set the threshold, and publish only a judge that may judge."""
    parser = command_line(__doc__, steps=2200, batch=96, lr=3e-3, seed=77)
    parser.add_argument("--examine", action="store_true", help="examine the judge that is there; do not train")
    args, pool = begin(parser)
    if args.examine and args.start:
        raise Refused(f"--examine is of the judge in {args.data / 'judge'}, --start trains another; give one of them")
    adopt(args, "judge", ("judge",), ("vae",))
    drawings = Drawings(args.data / "drawings.npz")
    if pool.drawings != drawings.digest():
        raise Refused(f"{args.data / 'pool.npz'} was drawn from other drawings than are there; run pool.py again")
    folder_digest(made_by("train_vae.py", args.data / "vae"))  # refuses what is left of one
    vae = AutoencoderKL.from_pretrained(args.data / "vae").float().to(args.device).eval()
    if args.examine:
        network = published(args.data / "judge").to(args.device)
        asked, runs = exam(drawings, vae), {"judge": history(args.data / "judge", "judge")}
    else:
        stage = new_stage(args, drawings, pool)
        if stage.made(args.data / "judge"):
            return
        asked = exam(drawings, vae)
        train(stage, drawings, pool, vae, asked["pages"])
        network, runs = stage.model, stage.runs
    rng = np.random.default_rng(EXAM_SEED)
    fixing, fresh = (outside(drawings, numbers, pool, rng) for numbers in shares(drawings)[1:])
    threshold, figures = examine(network, asked, fixing, fresh)
    print(json.dumps({"threshold": threshold, **figures}))
    refuse_unfit(figures)
    publish(network, threshold, figures, runs, args.data)
    print(f"the judge is in {args.data / 'judge'}")


if __name__ == "__main__":
    main()
