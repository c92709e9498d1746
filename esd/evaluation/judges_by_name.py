"""Judges by name: what a picture shows, whether it should not be seen, how far it is from another.

| name | reads | package or weights |
|---|---|---|
| `emoji-judge` | thing, style | comes with emoji-sd |
| `emoji-halves` | first, second: the things on the left and on the right of a scene | comes with emoji-sd |
| `emoji-clip` | thing, style, zero-shot; and the prompt's CLIP score | comes with emoji-sd |
| `clip:NAME` | the prompts' labels, zero-shot; and the prompt's CLIP score | a CLIP: a folder, a name on the hub |
| `resnet50` | class, of ImageNet's 1000 | microsoft/resnet-50 on the hub |
| `nudenet` | nudity: the most probable part laid bare; and how many | `pip install 'esd-diffusion[nudenet]'` |
| `nsfw:NAME` | nsfw: the probability of that label | an image classifier: a folder, a name on the hub |
| `ssim`, `lpips` | likeness, distance of base and erased | none; `pip install 'esd-diffusion[lpips]'` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esd.errors import UserError
from esd.evaluation.distances import Ssim
from esd.evaluation.judges import EMOJI, HalvesJudge, Judge, PairJudge, load_judge
from esd.evaluation.pretrained import Classifier, Lpips, NudeNet, ZeroShot
from esd.evaluation.prompts import say
from esd.evaluation.vocabulary import Vocabulary

# Columns of prompt sets whose values a picture may show, and how a CLIP is told of one.
ASKED = {
    "thing": ("a picture of a {}", "a {}"),
    "style": ("a picture in the {} style", "{} style"),
    "class": ("a photo of a {}", "a {}"),
    "concept": ("a picture of {}", "{}"),
    "artist": ("a painting by {}", "art in the style of {}"),
}


def find(
    name: str, *, model: str, vocabulary: Vocabulary | None, labels: Mapping[str, Sequence[str]], device: Any = "cpu"
) -> Judge | PairJudge:
    """The judge of a name.

    Args:
        name: see the module.
        model: path or hub name of the model whose pictures are read; bundled judges lie beside it.
        vocabulary: of the model, or None.
        labels: column of the prompts to the values in it; of those in `ASKED` with two values or more a CLIP is asked.
        device: where networks of real models read; the bundled ones read on the CPU.

    Raises:
        UserError: no judge has the name, or it lacks its package or its weights.
    """
    kind, _, source = name.partition(":")
    if kind == "clip" and source:
        texts = {
            question: {answer: [say(text, {"": answer}) for text in ASKED[question]] for answer in answers}
            for question, answers in labels.items()
            if question in ASKED and len(answers) > 1  # of one answer it would always be sure
        }
        return ZeroShot(name, source, texts, device=device)
    if kind == "nsfw" and source:
        return Classifier(name, source, "nsfw", positive="nsfw", threshold=0.5, device=device)
    if name in ("emoji-judge", "emoji-halves", "emoji-clip"):
        return _bundled(name, model, vocabulary)
    if name == "resnet50":
        return Classifier(name, "microsoft/resnet-50", "class", device=device)
    if name == "nudenet":
        return NudeNet()
    if name == "ssim":
        return Ssim()
    if name == "lpips":
        return Lpips(device)
    raise UserError(
        f"judges: no judge is called {name!r}; allowed: emoji-judge, emoji-halves, emoji-clip, clip:NAME, resnet50, "
        "nudenet, nsfw:NAME, ssim, lpips, with NAME a folder or a name on the hub, such as "
        "clip:openai/clip-vit-base-patch32"
    )


def _bundled(name: str, model: str, vocabulary: Vocabulary | None) -> Judge:
    """The bundled judge or CLIP, which lie beside the bundled model."""
    judge = load_judge(model)
    if vocabulary is None or judge is None:
        raise UserError(f"judges: {name} reads the pictures of emoji-sd, and {model} comes without it; leave it out")
    if name == "emoji-judge":
        return judge
    if name == "emoji-halves":
        return HalvesJudge(judge)
    held_out = vocabulary.phrasings["held_out"]
    texts = {
        domain: {answer: [say(text, {domain: answer}) for text in held_out[domain]] for answer in answers}
        for domain, answers in (("thing", judge.things), ("style", judge.styles))
    }
    return ZeroShot(name, Path(model).parent / name, texts, validated=EMOJI)
