"""What the rest of the code may assume about a model: the `Family` protocol.

Every difference between architectures (conditioning tensors, input scaling, packing, guidance embeddings,
timestep shift) lives behind these methods and nowhere else. `predict` takes the denoiser as an argument, so
the live student, its DDP wrapper, the teacher view and a hooked model are all just callables.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from esd import seeding
from esd.errors import UserError
from esd.objectives import PredictionType
from esd.selection import ALIASES, ParameterInfo, Preset, Selection, resolve
from esd.weights import refuse_fused

Guidance = Literal["cfg", "distilled", "none"]
Null = Literal["zeros", "empty"]
Part = Literal["encoders", "denoiser", "vae"]
Denoiser = Callable[..., Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is conditioned on: named tensors, batch first.

    Attributes:
        tensors: for SD1 ``{"encoder_hidden_states": (b, n, d)}``; SDXL adds pooled text, FLUX.1-dev also the
            embedded guidance scale (b,), and so on. What follows from the size of the latents (time ids, position
            ids) is not in here: `Family.predict` works it out.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Rows of the batch, kept as a batch: an int gives a batch of one."""
        if isinstance(rows, int):
            rows = [rows]
        return self._map(lambda tensor: tensor[rows])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One batch after the other; all must hold the same names."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device or in another floating-point type (integer tensors keep theirs)."""
        return self._map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning({name: function(tensor) for name, tensor in self.tensors.items()})


class Family(ABC):
    """One architecture behind one set of methods.

    Attributes:
        name: of the architecture, such as "stable-diffusion".
        pipe: the stock diffusers pipeline it was made from.
        denoiser: the live UNet or transformer.
        prediction_type: "epsilon", "v_prediction" or "flow".
        sample_shape: (c, h, w) of a latent of the model's own size.
        patch: edge in latents of what becomes one token, so that sides must be multiples of it.
        guidance: "cfg" (two passes when the scale is above 1), "distilled" (one pass, told the scale) or
            "none" (one pass, no scale).
        presets: selections by name.
        preset_notes: what a preset means here, where its name alone would mislead; told whenever it is used.
        aliases: the model's own words for roles, such as attn2 for cross.
        absent: roles that this architecture has not, with what to say instead.
        time_unit: times of the scheduler's in a time of 1 as the denoiser is told it.
        text_first: whether text tokens stand before image tokens where joint attention sees both.
        segments: what the lists of `token_spans` are called, where there are several.
        stacks_passes: whether the stock pipeline evaluates null prompt and prompt in one batch, in this order; else
            it calls the denoiser for the prompt, and for the null prompt after it.
        dtype: floating-point type of the base's denoiser.
        device: where work is done; `place` brings there what the work needs.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]
    preset_notes: ClassVar[Mapping[str, str]] = {}
    aliases: ClassVar[Mapping[str, str]] = ALIASES
    absent: ClassVar[Mapping[str, str]] = {}
    time_unit: ClassVar[float] = 1.0
    text_first: ClassVar[bool] = True
    segments: ClassVar[tuple[str, ...]] = ("",)
    stacks_passes: ClassVar[bool] = True

    guidance: Guidance
    pipe: Any
    denoiser: nn.Module
    prediction_type: PredictionType
    sample_shape: tuple[int, int, int]
    patch: int = 1
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (len(prompts), ...) on `device`; each prompt is encoded once, and the encoders come for that."""

    def null(self, kind: Null | None = None) -> Conditioning:
        """Conditioning of the null prompt, one row.

        Args:
            kind: "empty" encodes the empty prompt; "zeros" is zeros, which SDXL's pipeline takes for it; None is
                what the stock pipeline takes when no negative prompt is given.

        Raises:
            UserError: zeros, and this model's pipeline knows no such thing.
        """
        if kind == "zeros":
            raise UserError(
                f"null=zeros: {type(self.pipe).__name__} encodes the empty prompt instead; allowed: empty, or none "
                "for the model's own"
            )
        return self.encode([""])

    def with_guidance(self, cond: Conditioning, scale: float) -> Conditioning:
        """The conditioning with an embedded guidance scale; the very same object where that changes nothing.

        Only "distilled" models are told a scale. Their prompts are encoded at scale 1, as upstream's targets are.
        """
        return cond

    def advice(self, num_steps: int, guidance_scale: float) -> list[str]:
        """What to tell a user who samples with these settings: legal, but hardly what was meant."""
        if self.guidance == "none" and guidance_scale > 1:
            return [f"guidance_scale={guidance_scale:g} changes nothing: {self.name} takes no guidance"]
        return []

    def channels_last(self) -> None:
        """Lays the weights of the denoiser and the VAE out as convolutions on cards like them.

        Raises:
            UserError: the denoiser convolves nothing to speak of.
        """
        raise UserError(
            f"training.channels_last=true: {type(self.denoiser).__name__} has no convolutions that it would speed up; "
            "set training.channels_last=false"
        )

    @abstractmethod
    def modules(self, part: Part) -> list[Any]:
        """The modules of the pipeline that a part of it is made of."""

    @abstractmethod
    def place(self, *parts: Part) -> None:
        """Puts these parts on `device` and all others on the CPU, those first; prompts encoded so far stay usable."""

    @contextmanager
    def drawing(self) -> Iterator[Any]:
        """The stock pipeline, ready to draw on `device` for the length of a `with` block.

        On a card each part is there only while it works, and on the CPU before and after, so that drawing takes the
        memory of the largest part and not of all.
        """
        if self.device.type == "cpu":
            yield self.pipe
            return
        self.place()
        self.pipe.enable_model_cpu_offload(device=self.device)
        try:
            yield self.pipe
        finally:
            self.pipe.remove_all_hooks()
            self.place()

    @abstractmethod
    def decoded_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of what the VAE decodes to a picture of the model's own size."""

    @abstractmethod
    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square pictures.

        Args:
            size: edge of a picture in pixels, or None for the model's own.

        Raises:
            UserError: no latents decode to pictures of that size.
        """

    def initial_noise(self, generators: Sequence[torch.Generator], size: int | None = None) -> Tensor:
        """x_T, unit variance, float32 (len(generators), c, h, w): row i from CPU generator i alone.

        Scaling to what the scheduler starts from is `first_latents`, and belongs to the rollout.

        Args:
            generators: one for each row.
            size: see `latent_shape`.
        """
        return seeding.normal(generators, self.latent_shape(size)).to(self.device)

    @abstractmethod
    def encode_images(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Clean latents (b, c, h, w), float32, of pictures; what `decode` undoes, as far as the VAE can.

        Args:
            images: (b, 3, H, W) in [0, 1]; with generators also a single one for all rows.
            generators: one for each row, to draw from the encoder's posterior as the stock img2img pipelines do; None
                takes its mean.

        Raises:
            UserError: no latents are of pictures of that size.
        """

    @abstractmethod
    def scheduler(self, num_steps: int, name: str | None = None, latent_shape: Sequence[int] | None = None) -> Any:
        """A fresh diffusers scheduler with its timesteps set.

        Args:
            num_steps: sampling steps, >= 1 (schedulers may visit more points than that).
            name: one of the family's scheduler names, or None for the pipeline's own.
            latent_shape: (c, h, w) of what is sampled, on which some schedules depend; None for the model's own.

        Raises:
            UserError: unknown name, or num_steps out of range.
        """

    def first_latents(self, scheduler: Any, noise: Tensor) -> Tensor:
        """x_T at the level the scheduler starts from, of unit-variance noise (b, c, h, w)."""
        return noise * scheduler.init_noise_sigma

    def model_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        """What the denoiser gets for latents `x` at time `t`: Euler-type schedulers rescale here."""
        return scheduler.scale_model_input(x, t)

    @abstractmethod
    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The denoiser's prediction in its own parametrisation, float32 (b, c, h, w).

        Args:
            denoiser: the live module, a wrapper of it, or the teacher view.
            x: (b, c, h, w), already through `model_input`.
            t: scalar or (b,), in the scheduler's units.
            cond: batch of b.
        """

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (b,) of signal and noise in x_t = α x_0 + σ ε, float32; a fractional t (b,) interpolates."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W), float32 in [0, 1], of clean latents (b, c, h, w)."""
        return self.render(latents).clamp(0, 1)

    @abstractmethod
    def render(self, latents: Tensor) -> Tensor:
        """As `decode`, but gradients flow, also where a value lies outside of [0, 1], for it is not clamped."""

    @abstractmethod
    def parameter_infos(self) -> list[ParameterInfo]:
        """The role of every parameter of the denoiser, in the model's order."""

    @abstractmethod
    def token_spans(self, prompt: str) -> list[list[Span | None]]:
        """Which characters of a prompt each text token stands for, as the denoiser gets them.

        Returns:
            a list for each encoder whose tokens follow one another, with (begin, end) for each token; None for one that
            stands for none of the prompt, such as start, end and padding.

        Raises:
            UserError: the tokenizer does not tell.
        """

    @abstractmethod
    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Words and symbols of the prompts that the text encoder cannot have learned, in order of appearance."""

    @abstractmethod
    def cut(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that are too long for the text encoder, each with the end of it that is not read."""

    def partly_read(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that one of several text encoders reads less of than another, each with the end it leaves out."""
        return {}

    def select(self, expression: str) -> Selection:
        """The parameters an expression names; see `esd.selection`.

        Raises:
            SelectionError: malformed, or a part of it matches nothing.
            UserError: the model's projections are fused.
        """
        refuse_fused(self.denoiser)
        return resolve(
            expression,
            self.parameter_infos(),
            self.presets,
            type(self.denoiser).__name__,
            aliases=self.aliases,
            notes=self.preset_notes,
            absent=self.absent,
        )

    @property
    def base_name(self) -> str:
        """The base, for provenance: a hub id, the full path of a local folder, or the class of one made in memory."""
        where = str(getattr(self.pipe, "name_or_path", None) or "")
        if where and Path(where).is_dir():
            return str(Path(where).resolve())
        return where or type(self.pipe).__name__

    @property
    def base_revision(self) -> str | None:
        """The commit of a hub model, as the cache folder its denoiser came from names it; None for any other base."""
        where = str(getattr(self.denoiser, "config", {}).get("_name_or_path", ""))
        commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?![^/\\])", where)
        return commit[1] if commit else None


def check_steps(num_steps: int, num_train_timesteps: int) -> None:
    """Raises UserError unless 1 <= num_steps <= num_train_timesteps."""
    if not 1 <= num_steps <= num_train_timesteps:
        raise UserError(f"num_steps is {num_steps}; allowed: 1 to {num_train_timesteps}, such as 50")
