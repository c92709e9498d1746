"""The walk, station by station; what a model has no such thing for is left out, in words."""

from __future__ import annotations

from collections.abc import Sequence

from esd.analysis.begin import analysis
from esd.analysis.results import Results
from esd.analysis.subject import Subject
from esd.families.unet import UNetFamily

from . import sampling_figures, word_figures
from .walker import Walk
from .words import pixels


@analysis
def analyse(
    subject: Subject,
    results: Results,
    *,
    prompt: str,
    other: str,
    words: Sequence[str],
    pictures: int,
    samplers: Sequence[str],
    sampler_steps: Sequence[int],
    starts: Sequence[float],
    shares: Sequence[float],
    scales: Sequence[float],
    blue: Sequence[float],
    drawings: Sequence[str],
    elsewhere: Sequence[str],
    updates: int,
    lr: float,
) -> None:
    """Leaves figures and tables of every station that the model has; of the erased model where there is one.

    Args:
        subject: the model.
        results: gets tables and figures.
        prompt: what is drawn.
        other: what pictures go on under, and what the prompt is mixed with.
        words: the word of the prompt that gets the second one's embedding.
        pictures: of everything, each with its own seed.
        samplers: names of schedulers.
        sampler_steps: of each of them.
        starts: shares of the steps that a picture skips.
        shares: of the prompt in a mixture.
        scales: of classifier-free guidance.
        blue: scales of guidance towards blue.
        drawings: files to learn a new word from; none has the model draw the prompt.
        elsewhere: prompts in which the new word is then tried.
        updates: of the new word's embedding.
        lr: its learning rate.

    Raises:
        UserError: a word is several tokens, or a file cannot be read.
    """
    family = subject.family
    reads = isinstance(family, UNetFamily)
    if isinstance(family, UNetFamily):
        for word in words:
            family.embeddings_of(word)
        for file in drawings:
            pixels(file, (8, 8))  # told now, not after all other stations
    with subject.wearing(subject.versions[-1]):
        walk = Walk(subject, results, prompt, other, subject.seeds(pictures))
        sampling_figures.show_schedule(walk)
        sampling_figures.show_samplers(walk, samplers, sampler_steps)
        sampling_figures.show_strips(walk)
        sampling_figures.show_img2img(walk, starts)
        sampling_figures.show_mixtures(walk, shares)
        sampling_figures.show_guidance(walk, scales)
        sampling_figures.show_blue(walk, blue)
        if reads:
            word_figures.show_embeddings(walk)
            word_figures.show_swap(walk, *words)
            word_figures.show_new_word(walk, words[0], drawings, elsewhere, updates, lr)
        else:
            results.note(
                f"Left out: embeddings, swapped words and a new word, for {family.name} is read for by other encoders "
                "than CLIP's."
            )
