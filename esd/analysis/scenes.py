"""Pictures of a prompt beside those of other prompts that take over its attention, and what is seen on their sides.

A *scene* is a prompt with what it is edited to. All its edits are drawn in one batch with the unedited picture, from
the same noise, so that they take attention from its row. Where the prompt names two things, the judge reads the halves
of pictures: the thing that was replaced is on the *changed* side, the other one on the *kept* side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esd.evaluation.pixels import as_uint8
from esd.families import Family
from esd.interventions import AttentionEdit, AttentionMaps, LocalBlend, Op, Reweight, resolve, sample
from esd.interventions.sites import Site, is_attention
from esd.interventions.words import words_of

from .edits import where
from .results import Results
from .subject import Subject

FAR = 1_000_000  # seeds apart: another picture of the same prompt
PLAIN, OTHER_SEED, NO_CONTROL = ("the prompt", 0.0), ("another seed", 0.0), ("no control", 0.0)
Edit = tuple[str, float]  # what is done, and how much of it


@dataclass(frozen=True)
class Scene:
    """A prompt and what it is edited to.

    Attributes:
        prompt: whose attention is taken.
        replaced: of as many words, of which some differ.
        refined: says more.
    """

    prompt: str
    replaced: str
    refined: str

    @cached_property
    def swapped(self) -> tuple[str, str]:
        """The first word that differs, in both prompts."""
        pairs = zip(words_of(self.prompt), words_of(self.replaced), strict=True)
        return next((one, other) for one, other in pairs if one != other)


@dataclass(frozen=True)
class Knobs:
    """How attention is edited.

    Attributes:
        places: attentions that read the text, in the order they run.
        selves: expression of those in which the image attends to itself.
        cross_replace: share of the steps in which attention to the text is replaced.
        self_replace: the same for attention of the image to itself.
        self_tokens: most image tokens of an attention of which that is replaced.
        threshold: of local blend.
        resolution: of its maps, in image tokens; None for all.
        shares: of steps and of layers in a sweep.
        weights: of the swapped word.
    """

    places: Sequence[Site]
    selves: str
    cross_replace: float
    self_replace: float
    self_tokens: int
    threshold: float
    resolution: int | None
    shares: Sequence[float]
    weights: Sequence[float]

    @property
    def where(self) -> str:
        """Names all the places."""
        return where(self.places)

    def edits(self, scene: Scene) -> dict[Edit, tuple[str, tuple[Op, ...]]]:
        """Name of each edit to its prompt and ops, which take from row 0 of the batch."""
        steps, image = self.cross_replace, self.self_replace
        swap = AttentionEdit(self.where, source=0, cross_replace_steps=steps)
        selves: dict[str, Any] = {"self_replace_steps": image, "self_tokens": self.self_tokens}
        both = AttentionEdit(self.selves, source=0, cross_replace_steps=steps, **selves)
        blend = LocalBlend(
            self.where, source=0, words=scene.swapped, threshold=self.threshold, resolution=self.resolution
        )
        refine = AttentionEdit(self.where, source=0, how="refine", cross_replace_steps=steps)
        refine_both = AttentionEdit(self.selves, source=0, how="refine", cross_replace_steps=steps, **selves)
        found: dict[Edit, tuple[str, tuple[Op, ...]]] = {
            PLAIN: (scene.prompt, ()), OTHER_SEED: (scene.prompt, ()), NO_CONTROL: (scene.replaced, ()),
            ("replace", steps): (scene.replaced, (swap,)),
            ("replace + self", image): (scene.replaced, (both,)),
            ("replace + self + blend", self.threshold): (scene.replaced, (both, blend)),
            ("refined, no control", 0.0): (scene.refined, ()),
            ("refine", steps): (scene.refined, (refine,)),
            ("refine + self", image): (scene.refined, (refine_both,)),
        }  # fmt: skip
        for share in self.shares:
            some = self.places[: max(1, round(share * len(self.places)))]
            ops = (
                AttentionEdit(self.where, source=0, cross_replace_steps=share),
                AttentionEdit(where(some), source=0, cross_replace_steps=1.0),
            )
            found |= {(what, share): (scene.replaced, (op,)) for what, op in zip(("steps", "layers"), ops, strict=True)}
        for weight in self.weights:
            weighed = () if weight == 1 else (Reweight(self.where, weights={scene.swapped[0]: weight}),)
            found[("reweight", weight)] = (scene.prompt, weighed)
        return found


def places_of(family: Family, expression: str | None) -> list[Site]:
    """Attentions that read the text, in the order they run; all of them unless an expression names some."""
    parts = {info.part for info in family.parameter_infos()}
    return resolve(family, expression or ("cross" if "cross" in parts else "joint"), kind=is_attention)


def with_selves(places: Sequence[Site]) -> str:
    """An expression for these attentions and those of the image to itself; joint attention is both."""
    return where(places) + ("" if places[0].part == "joint" else " + self")


@dataclass(frozen=True)
class Pair:
    """One picture of a scene under every edit.

    Attributes:
        images: uint8 RGB (edits, H, W, 3).
        apart: root mean square difference of what the denoiser gets from what it gets for the unedited picture, before
            each step and after the last (edits, steps + 1).
        maps: the unedited picture's, mean over places (steps, tokens, h, w).
        by_place: the same, mean over steps (places, tokens, h, w).
    """

    images: np.ndarray
    apart: np.ndarray
    maps: np.ndarray
    by_place: np.ndarray


def draw_pair(subject: Subject, results: Results, name: str, scene: Scene, seed: int, knobs: Knobs) -> Pair:
    """Draws a picture of a scene under every edit, or reads what is kept under the name."""
    drawn = cache(lambda: _draw(subject, scene, seed, knobs))
    return Pair(
        images=results.kept(f"{name}-images", lambda: drawn().images),
        apart=results.kept(f"{name}-apart", lambda: drawn().apart),
        maps=results.kept(f"{name}-maps", lambda: drawn().maps),
        by_place=results.kept(f"{name}-places", lambda: drawn().by_place),
    )


def _draw(subject: Subject, scene: Scene, seed: int, knobs: Knobs) -> Pair:
    """In batches, each with the unedited picture in row 0."""
    family, edits = subject.family, list(knobs.edits(scene).items())
    size = max(1, subject.batch_size - 1)
    maps = AttentionMaps(knobs.where, resolution=knobs.resolution, rows=(0,))
    places = AttentionMaps(knobs.where, by_place=True, by_step=False, rows=(0,))
    images, apart = list[np.ndarray](), list[np.ndarray]()
    for begin in range(1, len(edits), size):
        batch = [edits[0], *edits[begin : begin + size]]
        seeds = [seed + FAR if edit == OTHER_SEED else seed for edit, _ in batch]
        ops = [_at(op, row) for row, (_, (_, its)) in enumerate(batch) for op in its]
        drawn = sample(
            family, [prompt for _, (prompt, _) in batch], seeds, *ops, *(() if images else (maps, places)),
            num_steps=subject.num_steps, guidance_scale=subject.guidance_scale,
        )  # fmt: skip
        passed = torch.cat([drawn.trajectory.inputs, drawn.trajectory.final[None]])
        skip = 1 if images else 0
        images.append(as_uint8(drawn.images)[skip:])
        apart.append((passed - passed[:, :1]).square().flatten(2).mean(2).sqrt().T.cpu().numpy()[skip:])
    placed = torch.stack([_sized(places.maps.mean(place=place), places.maps.mean()) for place in places.maps.places])
    return Pair(np.concatenate(images), np.concatenate(apart), maps.maps.by_step()[:, 0].numpy(), placed[:, 0].numpy())


def _at(op: Op, row: int) -> Op:
    """The op, confined to a row of the batch."""
    return replace(op, rows=(row,))


def _sized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (b, tokens, h, w) as large as others, token by token of the picture."""
    return torch.nn.functional.interpolate(maps, like.shape[-2:], mode="nearest")


@dataclass(frozen=True)
class Drawn:
    """All pictures, each drawn once.

    Attributes:
        subject: the model.
        results: keeps them.
        scenes: what is edited.
        seeds: of each scene's pictures.
        knobs: how.
    """

    subject: Subject
    results: Results
    scenes: Sequence[Scene]
    seeds: Sequence[int]
    knobs: Knobs
    _pairs: dict[tuple[Scene, str], list[Pair]] = field(init=False, repr=False, default_factory=dict)

    def pairs(self, scene: Scene, version: str = "base") -> list[Pair]:
        """A scene's pictures under every edit, one for each seed."""
        if (scene, version) not in self._pairs:
            number = self.scenes.index(scene)
            with self.subject.wearing(version):
                self._pairs[scene, version] = [
                    draw_pair(self.subject, self.results, f"{version}-{number}-{seed}", scene, seed, self.knobs)
                    for seed in self.seeds
                ]
        return self._pairs[scene, version]

    def edits(self, scene: Scene) -> list[Edit]:
        """What was done, in the order of `Pair.images`."""
        return list(self.knobs.edits(scene))

    def images(self, scene: Scene, edit: Edit, version: str = "base") -> np.ndarray:
        """uint8 RGB (seeds, H, W, 3) under an edit."""
        at = self.edits(scene).index(edit)
        return np.stack([pair.images[at] for pair in self.pairs(scene, version)])

    @property
    def told(self) -> str:
        """How many there are."""
        return f"n = {len(self.seeds)} pictures of each of {len(self.scenes)} prompts"


@dataclass(frozen=True)
class Sides:
    """What the judge of halves sees in pictures.

    Attributes:
        asked: (n, 2) bool, whether the thing that the prompt names is seen on the changed, and on the kept side.
        was: (n,) bool, whether the thing that was replaced is still seen on the changed side.
        moved: (n, 2), `difference` to the unedited picture on the changed, and on the kept side.
    """

    asked: np.ndarray
    was: np.ndarray
    moved: np.ndarray


def sides(subject: Subject, images: np.ndarray, plain: np.ndarray, scene: Scene, prompt: str) -> Sides | None:
    """Reads both halves of pictures of a prompt.

    Args:
        subject: whose judge and vocabulary are asked.
        images: uint8 RGB (n, H, W, 3).
        plain: the same unedited.
        scene: that they belong to.
        prompt: that they were drawn from.

    Returns:
        None where nobody reads, or the prompts do not name two things of which one is replaced.
    """
    before, after, now = (things(subject, text) for text in (scene.prompt, scene.replaced, prompt))
    if subject.judge is None or not before or not after or not now:
        return None
    order = (0, 1) if before[0] != after[0] else (1, 0)
    read = subject.judge.halves(images)
    asked = np.stack([read[side].shows([now[side]] * len(images)) for side in order], axis=1)
    was = read[order[0]].shows([before[order[0]]] * len(images))
    width = images.shape[2] // 2
    halves = [(pictures[:, :, :width], pictures[:, :, width:]) for pictures in (images, plain)]
    return Sides(asked, was, np.stack([difference(halves[0][side], halves[1][side]) for side in order], axis=1))


def things(subject: Subject, prompt: str) -> list[str] | None:
    """The two things that a prompt names, left and right; None where these are not two."""
    found = subject.vocabulary.mentioned(prompt) if subject.vocabulary else []
    named = [name for domain, name in found if domain == "thing"]
    return named if len(named) == 2 else None


def difference(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,): root mean square difference, 0 to 1, of pictures uint8 RGB (n, H, W, 3)."""
    apart: np.ndarray = np.sqrt((((images.astype(np.float64) - others) / 255) ** 2).mean(axis=(1, 2, 3)))
    return apart
