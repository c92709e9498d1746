"""Figures of what becomes of words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from esd.analysis import figures
from esd.analysis.edits import picked
from esd.evaluation.pixels import images_of
from esd.families.unet import UNetFamily

from . import drawing, words
from .walker import COLUMNS, Walk

ROUNDED = 2  # of 255: no more than rounding
FEW = 6  # pictures that a new word is learned from, unless files are given


def show_embeddings(walk: Walk) -> None:
    """Token and position embeddings of the prompt."""
    assert isinstance(walk.family, UNetFamily)
    found = words.input_embeddings(walk.family, walk.prompt)
    names = [f"{i} {token.removesuffix('</w>')}" for i, token in enumerate(found.tokens)]
    norms = {
        "token": found.token.norm(dim=1).numpy(), "position": found.position.norm(dim=1).numpy(),
        "token + position": found.read.norm(dim=1).numpy(),
    }  # fmt: skip
    walk.results.table("embeddings", [
        {"place": i, "token": token} | {name: norm[i] for name, norm in norms.items()}
        for i, token in enumerate(found.tokens)
    ])  # fmt: skip
    off = float((found.read - found.token - found.position).abs().max())
    unit = torch.nn.functional.normalize(found.places, dim=1)
    alike = (unit @ unit.T).numpy()
    figure, (left, right) = figures.panels(1, 2, title="What the text encoder reads: token + position embedding")
    figures.bars(left, names, norms, x_name="norm", title=walk.prompt)
    left.set_xlim(right=1.6 * max(norm.max() for norm in norms.values()))  # room for the legend
    left.legend(loc="lower right")
    places = [str(i) if i % 4 == 0 else "" for i in range(len(alike))]
    figures.heat(right, alike, rows=places, columns=places, y_name="place", x_name="place", unit="cosine", signed=True,
                 title="likeness of position embeddings")  # fmt: skip
    neighbours = float(np.diag(alike, 1).mean())
    walk.results.figure("embeddings", figure, (
        f"The sum of both tables is what the first layer gets, up to {off:.1g}. Tokens of the prompt have norms of "
        f"{norms['token'].min():.2g} to {norms['token'].max():.2g}, places {norms['position'].min():.2g} to "
        f"{norms['position'].max():.2g}; neighbouring places have a mean cosine of {neighbours:.2f}, all pairs "
        f"{(alike.sum() - len(alike)) / (alike.size - len(alike)):.2f}."
    ))  # fmt: skip


def show_swap(walk: Walk, word: str, other: str) -> None:
    """One word's embedding in another's place."""
    family, subject = walk.family, walk.subject
    assert isinstance(family, UNetFamily)
    asked = walk.prompt.replace(word, other)
    drawn = {
        walk.prompt: walk.pictures("plain", lambda: drawing.walk(subject, walk.told(walk.prompt), walk.seeds).final),
        f"{other}'s embedding for {word}": walk.pictures(
            "swapped",
            lambda: (
                drawing.walk(
                    subject, words.swapped(family, [walk.prompt] * len(walk.seeds), word, other), walk.seeds
                ).final
            ),
        ),
        asked: walk.pictures("asked", lambda: drawing.walk(subject, walk.told(asked), walk.seeds).final),
    }
    rows = [{"drawn": name} | walk.reading(found, asked) for name, found in drawn.items()]
    walk.results.table("swap", rows)
    figure = figures.pictures(
        np.stack([np.concatenate(list(found[:, None]), axis=0) for found in drawn.values()]),
        title="A token's embedding in another one's place", rows=list(drawn), columns=walk.rows(), width=5.5,
    )  # fmt: skip
    _, swapped, aim = drawn.values()
    apart = int(np.abs(swapped.astype(int) - aim).max())
    walk.results.figure("swap", figure, f"With {other}'s embedding where {word}'s was, {told_swap(asked, apart)}")


def told_swap(asked: str, apart: int) -> str:
    """Whether a prompt with another word's embedding draws what the prompt with that word draws.

    Args:
        asked: the prompt with that word.
        apart: largest difference between their pictures, of 255.
    """
    if apart > ROUNDED:
        return f"the prompt does not draw what {asked!r} draws: pictures differ by up to {apart} of 255."
    return f"the prompt draws what {asked!r} draws: pictures differ by at most {apart} of 255."


def show_new_word(
    walk: Walk, word: str, files: Sequence[str], elsewhere: Sequence[str], updates: int, lr: float
) -> None:
    """A new word, learned from drawings, and drawn in other prompts."""
    family, subject, results = walk.family, walk.subject, walk.results
    assert isinstance(family, UNetFamily)
    known = words.drawings(subject, files) if files else None
    learning = words.Learning(
        concept=word, steps=updates, lr=lr, every=max(1, updates // (COLUMNS - 1)), examples=FEW, drawings=known
    )  # fmt: skip

    def learned() -> np.ndarray:
        found = words.learn(subject, walk.prompt, word, walk.seeds, learning)
        results.kept("new-word-losses", lambda: np.array([[one.update, one.loss] for one in found]))
        cond = words.with_new_word(
            family, [prompt for prompt in elsewhere for _ in walk.seeds], word, found[-1].embeddings
        )  # fmt: skip
        results.kept("new-word-elsewhere", lambda: images_of(
            family, drawing.walk(subject, cond, walk.seeds * len(elsewhere)).final
        ).reshape(len(elsewhere), len(walk.seeds), *found[0].images.shape[1:]))  # fmt: skip
        return np.stack([one.images for one in found])

    images = results.kept("new-word", learned)
    told = results.kept("new-word-losses", lambda: np.zeros(0))
    tried = results.kept("new-word-elsewhere", lambda: np.zeros(0))
    rows = [
        {"update": int(update), "loss": loss} | walk.reading(found, walk.prompt)
        for (update, loss), found in zip(told, images, strict=True)
    ]  # fmt: skip
    results.table("new_word", rows)
    read = [walk.reading(found, prompt) for prompt, found in zip(elsewhere, tried, strict=True)]
    results.table("new_word_elsewhere", [{"prompt": p} | r for p, r in zip(elsewhere, read, strict=True)])
    chosen = picked(range(len(images)), COLUMNS)
    new = walk.prompt.replace(word, "<v>")
    figure = figures.pictures(
        images[chosen].swapaxes(0, 1), title=f"A new word: {new}", rows=walk.rows(),
        columns=[f"{told[i, 0]:.0f}" for i in chosen], column_name="updates of its embedding",
    )  # fmt: skip
    least = int(told[:, 1].argmin())
    seen_by = "" if rows[0]["thing"] is None else (
        f" The judge sees what the prompt names in {rows[0]['thing']:.0%} before and {rows[-1]['thing']:.0%} after."
    )  # fmt: skip
    source = f"{len(files)} drawings" if files else f"{learning.examples} pictures that the base draws of the prompt"
    results.figure("new_word", figure, (
        f"Learned from {source}; the loss on noise that learning never saw goes from {told[0, 1]:.4f} to "
        f"{told[-1, 1]:.4f}, least {told[least, 1]:.4f} after {told[least, 0]:.0f}.{seen_by}"
    ))  # fmt: skip
    figure = figures.pictures(
        tried, title="The new word in other prompts", rows=[prompt.replace(word, "<v>") for prompt in elsewhere],
        columns=walk.rows(), width=5.5,
    )  # fmt: skip
    told_by = [
        f"{prompt.replace(word, '<v>')}: the judge sees {word} in {r['thing']:.0%}, the style in {r['style']:.0%}"
        for prompt, r in zip(elsewhere, read, strict=True)
        if r["thing"] is not None and r["style"] is not None
    ]
    results.figure(
        "new_word_elsewhere", figure, "; ".join(told_by or ["Prompts that the word was not learned in"]) + "."
    )
