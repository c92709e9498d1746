"""The judge: a CNN that reads thing and style, trained on drawings and their autoencoder round trips alone.

    python scripts/emoji/train_judge.py         # -> data/emoji/judge/

It never sees a picture from the diffusion model. Drawings of things outside the list are shown with a uniform target
("outlier exposure", Hendrycks et al. 2019); the threshold under which it says "neither" is then set on *other* drawings
outside the list, on noise and on smears, so that at most 5% of them are taken for a thing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from catalogue import STYLES, THINGS
from diffusers import AutoencoderKL
from pages import Drawings, Page, draw, draw_page, held_out_pairs
from pool import Pool
from safetensors.torch import save_file
from scipy import ndimage
from torch.nn import functional as F
from train_vae import to_model, to_pictures
from training import Recipe, Stage, begin, command_line

from esd.evaluation.judges import JudgeNetwork, half

MAY_TAKE = 0.05
"""Largest share of pictures without a listed thing that may be read as one."""
SCENES, OUTSIDERS = 4000, 3000
"""How many scenes (each cut in two halves) and pictures of things outside the list the judge learns from."""
NEEDED = {"thing": 0.97, "style": 0.95}
"""Smallest share of things and of styles read right with which a judge may judge."""


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
    for start in range(0, len(images), batch):
        x = to_model(images[start : start + batch], vae.device)
        parts.append(to_pictures(vae.decode(vae.encode(x).latent_dist.mode()).sample))
    return np.concatenate(parts)


def outsiders(drawings: Drawings, numbers: range, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return styled pages of things outside the list."""
    pick = rng.integers(len(numbers), size=count)
    return np.stack([draw([drawings.others[numbers[int(i)]]], int(rng.integers(len(STYLES))), rng) for i in pick])


def smears(pool: Pool, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return pictures that show nothing: noise of several colours, heavy blurs, and blends of three drawings."""
    out = []
    for i in range(count):
        three = pool.images[rng.integers(len(pool), size=3)].astype(np.float32)
        noise = rng.normal(128, 60, (64, 64, 3))
        made = (
            noise,
            ndimage.gaussian_filter(noise, (3, 3, 0)) * 4 - 384,
            ndimage.gaussian_filter(three[0], (6, 6, 0)),
            three.mean(0),
        )[i % 4]
        out.append(np.clip(made, 0, 255).astype(np.uint8))
    return np.stack(out)


def lessons(drawings: Drawings, pool: Pool, vae: AutoencoderKL, rng: np.random.Generator) -> Labelled:
    """Return what the judge learns: the pool, the pairs it lacks, and halves of scenes; a third of it round trips."""
    unseen = [Page((t,), s) for t, s in sorted(held_out_pairs()) for _ in range(16)]  # the judge must know every pair
    singles, scenes = np.flatnonzero(pool.second < 0), rng.choice(np.flatnonzero(pool.second >= 0), SCENES)
    drawn = np.stack([draw_page(drawings, page, rng) for page in unseen])
    left, right = (half(pool.images[scenes], side) for side in (0, 1))
    images = np.concatenate([pool.images[singles], drawn, left, right])
    again = rng.choice(len(images), len(images) // 3, replace=False)
    images[again] = round_trip(vae, images[again])
    return Labelled(
        images,
        np.concatenate([pool.first[singles], [p.things[0] for p in unseen], pool.first[scenes], pool.second[scenes]]),
        np.concatenate([pool.style[singles], [p.style for p in unseen], pool.style[scenes], pool.style[scenes]]),
    )


def exam(drawings: Drawings, vae: AutoencoderKL, seed: int, count: int = 3000) -> Labelled:
    """Return pictures drawn afresh and augmented, a third of them round trips."""
    rng = np.random.default_rng(seed)
    things, styles = rng.integers(len(THINGS), size=count), rng.integers(len(STYLES), size=count)
    images = np.stack([draw_page(drawings, Page((int(t),), int(s)), rng) for t, s in zip(things, styles, strict=True)])
    images[::3] = round_trip(vae, images[::3])
    return Labelled(augment(images, rng), things, styles)


def loss_of_reading(network: JudgeNetwork, images: np.ndarray, things: np.ndarray, styles: np.ndarray) -> torch.Tensor:
    """Return the cross-entropy of the pictures that have labels, and of the rest against a uniform target."""
    with torch.autocast("cpu", torch.bfloat16):
        thing, style = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    thing, style, known = thing.float(), style.float(), len(things)
    loss = F.cross_entropy(thing[:known], torch.from_numpy(things).long(), label_smoothing=0.02)
    loss = loss + F.cross_entropy(style[:known], torch.from_numpy(styles).long(), label_smoothing=0.02)
    return loss - 0.5 * thing[known:].log_softmax(1).mean()


def reads(network: JudgeNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best thing, its probability and the best style of each picture."""
    network.eval()
    with torch.no_grad():
        logits = [
            network(torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255) for part in np.array_split(images, 16)
        ]
    best = torch.cat([things.softmax(1) for things, _ in logits]).max(1)
    return best.indices.numpy(), best.values.numpy(), torch.cat([styles for _, styles in logits]).argmax(1).numpy()


def examine(network: JudgeNetwork, asked: Labelled, outside: np.ndarray) -> tuple[float, dict[str, float]]:
    """Return the threshold at which few enough of `outside` are taken for a thing, and the figures of the exam."""
    outside_sure = reads(network, outside)[1]
    threshold = float(np.quantile(outside_sure, 1 - MAY_TAKE))
    thing, sure, style = reads(network, asked.images)
    return threshold, {
        "thing": float((thing == asked.things).mean()),
        "thing_and_sure": float(((thing == asked.things) & (sure >= threshold)).mean()),
        "style": float((style == asked.styles).mean()),
        "outside_taken": float((outside_sure >= threshold).mean()),
        "n": len(asked.images),
        "n_outside": len(outside),
    }


def publish(network: JudgeNetwork, threshold: float, figures: dict[str, float], folder: Path) -> None:
    """Write the weights in half precision, and the configuration that names them by their hash."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
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


def main() -> None:
    """Train, examine, set the threshold, and publish only a judge that may judge."""
    args, pool = begin(command_line(__doc__, steps=2200, batch=96, lr=3e-3, seed=77))
    drawings = Drawings(args.data / "drawings.npz")
    vae = AutoencoderKL.from_pretrained(args.data / "vae").float().eval()
    rng, middle = np.random.default_rng(args.seed), len(drawings.others) // 2
    known = lessons(drawings, pool, vae, rng)
    unknown = outsiders(drawings, range(middle), rng, OUTSIDERS)
    asked = exam(drawings, vae, seed=4242)
    network = JudgeNetwork(len(THINGS), len(STYLES))
    recipe = Recipe(args.steps, args.batch, args.lr, weight_decay=0.05, ema=0.0, seed=args.seed, save_every=200)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        pick = rng.integers(len(known.images), size=recipe.batch)
        others = unknown[rng.integers(len(unknown), size=recipe.batch // 6)]
        shown = np.concatenate([known.images[pick], others, smears(pool, rng, recipe.batch // 12)])
        return loss_of_reading(network, augment(shown, rng), known.things[pick], known.styles[pick])

    def report() -> str:
        thing, _, style = reads(network, asked.images)
        return f"things {(thing == asked.things).mean():.1%}, styles {(style == asked.styles).mean():.1%}"

    Stage("judge", network, recipe, args.data / "state").run(loss_of, report)
    others = outsiders(drawings, range(middle, len(drawings.others)), rng, OUTSIDERS // 3)
    threshold, figures = examine(network, asked, np.concatenate([others, smears(pool, rng, OUTSIDERS // 8)]))
    print(json.dumps({"threshold": threshold, **figures}))
    for head, needed in NEEDED.items():
        if figures[head] < needed:
            sys.exit(
                f"the judge reads {figures[head]:.1%} of {head}s, below {needed:.0%}: it may not judge; raise --steps"
            )
    publish(network, threshold, figures, args.data / "judge")
    print(f"the judge is in {args.data / 'judge'}")


if __name__ == "__main__":
    main()
