"""The settings that each analysis of `esd.analyze` has of its own."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import ClassVar

from esd.config.options import check_ranges, fields_of, option
from esd.errors import UserError

SOLVERS = ("ddim", "euler", "heun", "dpm++", "unipc", "lms")  # schedulers that add no noise, from any first time on


class AnalysisSettings:
    """What the settings of every analysis share: there are none that do not hold, in Python neither.

    Attributes:
        analysis: its name.
    """

    analysis: ClassVar[str]

    def __post_init__(self) -> None:
        """Raises UserError, see `check`."""
        self.check()

    def check(self) -> None:
        """Raises UserError for values out of range, for an empty list that leaves nothing to look at, for a misfit."""
        check_ranges(self, f"{self.analysis}.")
        for name, value, spec in fields_of(self, f"{self.analysis}."):
            default = [] if spec.default_factory is MISSING else spec.default_factory()
            if value == [] != default:
                raise UserError(f"{name}=[] leaves nothing to look at; allowed: such as {name}={default}")

    def check_run(self, checkpoint: str | None, num_steps: int) -> None:
        """Raises UserError for values that do not fit the model looked at, or the steps that it is given."""


@dataclass
class LayersConfig(AnalysisSettings):
    """Settings of analysis=layers; see `esd.analysis.layers`."""

    analysis = "layers"

    prompts: list[str] = option(
        [
            "a cat in the mosaic style",
            "a house in the watercolor style",
            "a rose in the neon style",
            "a guitar in the flat style",
        ],
        "drawn with layers left out, or with layers that read another prompt or seed",
    )
    other_things: list[str] = option(
        [
            "a house in the mosaic style",
            "a cat in the watercolor style",
            "a guitar in the neon style",
            "a rose in the flat style",
        ],
        "for each of the prompts one that asks for another thing, otherwise alike",
    )
    other_styles: list[str] = option(
        [
            "a cat in the watercolor style",
            "a house in the mosaic style",
            "a rose in the flat style",
            "a guitar in the neon style",
        ],
        "for each of the prompts one that asks for another style, otherwise alike",
    )
    pictures: int = option(2, "of each prompt, where one layer is left out; each with its own seed", at_least=1)
    window_pictures: int = option(1, "of each prompt, under every other edit; at most layers.pictures", at_least=1)
    lengths: list[int] = option([], "of windows of consecutive layers; [] is every length", at_least=1)
    weights: list[float] = option([1.0, 5.0, 10.0], "w, of what layers make of the text", at_least=0)

    def check(self) -> None:
        """Raises UserError for prompts without counterpart, or for more pictures of windows than there are."""
        super().check()
        for name in ("other_things", "other_styles"):
            told = getattr(self, name)
            if len(told) != len(self.prompts):
                raise UserError(
                    f"layers.{name} has {len(told)} for {len(self.prompts)} layers.prompts; give one for each"
                )
        if len(set(self.prompts)) < len(self.prompts):
            raise UserError(f"layers.prompts={self.prompts} names a prompt twice; allowed: each once")
        if self.window_pictures > self.pictures:
            raise UserError(
                f"layers.window_pictures={self.window_pictures}: allowed: at most layers.pictures={self.pictures}"
            )


@dataclass
class AttentionConfig(AnalysisSettings):
    """Settings of analysis=attention; see `esd.analysis.attention`."""

    analysis = "attention"

    prompts: list[str] = option(
        ["a cat and a rose", "a guitar and a pizza"], "what pictures are edited from; two things for a judge of scenes"
    )
    replaced: list[str] = option(
        ["a dog and a rose", "a guitar and a cake"],
        "for each of the prompts one of as many words, some of them others",
    )
    refined: list[str] = option(
        ["a cat and a rose in the mosaic style", "a guitar and a pizza in the neon style"],
        "for each of the prompts one that says more",
    )
    pictures: int = option(8, "of each prompt, each with its own seed", at_least=1)
    where: str | None = option(None, "attentions whose maps are shown and edited; null is all that read the text")
    resolution: int | None = option(8, "edge of the maps shown, in image tokens; null is the largest", at_least=1)
    heads: str | None = option(
        None, "the attention shown head by head; null is the one that tells the sides of words apart best"
    )
    cross_replace: float = option(
        0.8, "share of the steps, from the first, in which attention to the text is replaced", above=0, at_most=1
    )
    self_replace: float = option(0.4, "the same for attention of the image to itself", above=0, at_most=1)
    self_tokens: int = option(
        256,
        "most image tokens of an attention of the image to itself of which that is replaced, as in the paper's code; "
        "1024 takes in those of SDXL at 1024 px that have the fewest",
        at_least=1,
    )
    threshold: float = option(0.3, "of local blend's mask, in shares of the largest attention", at_least=0, at_most=1)
    shares: list[float] = option(
        [0.2, 0.4, 0.6, 0.8, 1.0], "of the steps, and of the layers, that are replaced in a sweep", above=0, at_most=1
    )
    weights: list[float] = option([0.0, 0.5, 2.0, 4.0], "of the words that are replaced elsewhere", at_least=0)

    def check(self) -> None:
        """Raises UserError for prompts without counterpart, or of which nothing, or not word for word, differs."""
        super().check()
        for name in ("replaced", "refined"):
            if len(told := getattr(self, name)) != len(self.prompts):
                raise UserError(
                    f"attention.{name} has {len(told)} for {len(self.prompts)} attention.prompts; give one for each"
                )
        if len(set(self.prompts)) < len(self.prompts):
            raise UserError(f"attention.prompts={self.prompts} names a prompt twice; allowed: each once")
        for prompt, other in zip(self.prompts, self.replaced, strict=True):
            one, two = prompt.split(), other.split()
            if len(one) != len(two) or one == two:
                raise UserError(
                    f"attention.replaced: {other!r} for {prompt!r}; allowed: as many words, of which some differ"
                )

    def check_run(self, checkpoint: str | None, num_steps: int) -> None:
        """Raises UserError for a share that is not half a step."""
        own = ("cross_replace", "self_replace", "shares")
        told = {name: value if isinstance(value := getattr(self, name), list) else [value] for name in own}
        for name, share in ((name, share) for name, shares in told.items() for share in shares):
            if not round(share * num_steps):
                raise UserError(
                    f"attention.{name}: {share:g} of num_steps={num_steps} is no step; set a larger share or more steps"
                )


@dataclass
class WalkthroughConfig(AnalysisSettings):
    """Settings of analysis=walkthrough; see `esd.analysis.walkthrough`."""

    analysis = "walkthrough"

    prompt: str = option("a cat in the mosaic style", "what is drawn")
    other: str = option("a dog in the watercolor style", "what pictures go on under, and what the prompt is mixed with")
    words: list[str] = option(
        ["cat", "dog"], "of the prompt the word that gets the second one's embedding, and then that of a new word"
    )
    pictures: int = option(2, "of everything, each with its own seed", at_least=1)
    samplers: list[str] = option(
        ["ddim", "euler", "heun", "dpm++", "unipc"], f"compared as solvers of one equation: {', '.join(SOLVERS)}"
    )
    sampler_steps: list[int] = option([5, 10, 20, 40], "steps of each sampler", at_least=2, at_most=1000)
    starts: list[float] = option(
        [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "shares of the steps that a picture skips", at_least=0, below=1
    )
    shares: list[float] = option(
        [0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0], "of the prompt in a mixture", at_least=0, at_most=1
    )
    scales: list[float] = option([0.0, 1.0, 2.0, 4.0, 8.0, 16.0], "of guidance; 0 is the null prompt's", at_least=0)
    blue: list[float] = option([0.0, 25.0, 50.0, 75.0, 100.0], "scales of guidance towards blue", at_least=0)
    drawings: list[str] = option(
        [], "files of pictures that the prompt describes, to learn a new word from; [] has the base draw it"
    )
    elsewhere: list[str] = option(
        ["a cat in the watercolor style", "a cat in the neon style", "a cat in the flat style"],
        "prompts in which the new word is then tried",
    )
    updates: int = option(105, "of the new word's embedding", at_least=1)
    lr: float = option(0.01, "learning rate of the new word's embedding", above=0)

    def check(self) -> None:
        """Raises UserError for words that the prompts do not hold, or a sampler of another kind."""
        super().check()
        if len(self.words) != 2:
            raise UserError(f"walkthrough.words={self.words}: allowed: two words, such as [cat, dog]")
        for name, prompt in (("prompt", self.prompt), *(("elsewhere", prompt) for prompt in self.elsewhere)):
            if self.words[0].lower() not in prompt.lower().split():
                raise UserError(f"walkthrough.{name}={prompt!r} does not hold {self.words[0]!r}, the first of words")
        for sampler in self.samplers:
            if sampler not in SOLVERS:
                raise UserError(f"walkthrough.samplers: {sampler!r}; allowed: {', '.join(SOLVERS)}")


@dataclass
class RepresentationsConfig(AnalysisSettings):
    """Settings of analysis=representations; see `esd.analysis.representations`."""

    analysis = "representations"

    prompts: list[str] = option(
        [
            "a cat in the flat style", "a cat in the watercolor style", "a dog in the flat style",
            "a rose in the flat style", "a bus in the neon style",
        ],
        "one picture each, which the model is then shown",
    )  # fmt: skip
    positions: list[str] = option(
        [],
        "where representations are taken: modules by path, or selections such as up[1]; [] is the middle of the model, "
        "and half way from there on",
    )
    noises: int = option(100, "that the spread is taken over", at_least=2)
    channel_steps: list[int] = option(
        list(range(0, 501, 50)), "training times at which channels are measured", at_least=0
    )
    histogram_step: int = option(100, "training time of the histogram of channels", at_least=0)
    map_step: int = option(50, "training time of the maps of spread and likeness", at_least=0)
    spread_steps: list[int] = option(
        list(range(0, 251, 50)), "training times at which the mean spread is measured", at_least=0
    )


@dataclass
class ErasureConfig(AnalysisSettings):
    """Settings of analysis=erasure; see `esd.analysis.erasure`."""

    analysis = "erasure"

    concept: str | None = option(None, "one of those that were erased; null is the first")
    target: list[str] = option([], "prompts that ask for what was erased; [] takes those of the model's vocabulary")
    retained: list[str] = option([], "prompts that should be left alone; [] takes those of the model's vocabulary")
    pictures: int = option(6, "of target and of retained prompts, in every place and step that is tried", at_least=1)
    windows: int = option(5, "into which the sampling steps are cut; at most num_steps", at_least=1)
    inputs: int = option(
        40, "of each probe that are of the concept; as many others, half of all for the test", at_least=4
    )

    def check_run(self, checkpoint: str | None, num_steps: int) -> None:
        """Raises UserError without a checkpoint, and for more windows than steps."""
        if checkpoint is None:
            raise UserError("checkpoint=null: analysis=erasure looks at an erased model; give checkpoint=runs/NAME")
        if self.windows > num_steps:
            raise UserError(
                f"erasure.windows={self.windows}: num_steps={num_steps} steps are cut into {num_steps} at most; "
                f"allowed: 1 to {num_steps}"
            )
