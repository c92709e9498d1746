"""What families of stock diffusers pipelines share: a cache of encoded prompts, encoders that leave memory,
sizes, decoding, what a tokenizer knows, and kinds of parameters.

A subclass says how one prompt becomes a `Conditioning` (`_encode`), how its denoiser is called (`predict`),
what its schedule is (`scheduler`, `alpha_sigma`) and which role a parameter's name stands for
(`parameter_infos`). docs/add-a-family.md walks through one.
"""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from esd import seeding
from esd.errors import UserError
from esd.selection import ParameterInfo

from .base import Conditioning, Family, Part, Span

_WHOLE_VOCABULARY = 20_000  # a tokenizer with fewer entries was made for a closed list of words

# a word, or one symbol with what modifies it: variation selectors, skin tones, further emoji joined to it
_WORD = re.compile(r"\w+|[^\w\s](?:[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]|\u200d.)*")
_WORD_MARKS = ("</w>", "\u2581", "\u0120")  # of CLIP, T5, Qwen: where a word ends or begins

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv2d, "conv"),
    (nn.Embedding, "embedding"),
)


class PipelineFamily(Family):
    """A family made from a stock pipeline.

    Attributes:
        denoiser_name: of the pipeline's component that is trained, "unet" or "transformer".
        encoder_names: of its text encoders.
        optional_encoders: those of them that a pipeline may lack.
        pixels_per_latent: edge in pixels of what becomes one latent.

    Args:
        pipe: the pipeline; only its denoiser is ever changed, and only by `esd.weights` or `esd.checkpoint`.
        sample_shape: (c, h, w) of a latent of the model's own size.

    Raises:
        UserError: a text encoder is missing, or files of its tokenizer.
    """

    denoiser_name: ClassVar[str]
    encoder_names: ClassVar[tuple[str, ...]]
    optional_encoders: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parts(cls) -> dict[str, bool]:
        """What its pipelines consist of, by the names of the components, and whether one may do without."""
        encoders = {name: name in cls.optional_encoders for name in cls.encoder_names}
        tokenizers = {name.replace("text_encoder", "tokenizer"): may for name, may in encoders.items()}
        return encoders | tokenizers | dict.fromkeys((cls.denoiser_name, "vae", "scheduler"), False)

    def __init__(self, pipe: Any, sample_shape: tuple[int, int, int]) -> None:
        needed = [name for name in self.encoder_names if name not in self.optional_encoders]
        if missing := [name for name in needed if getattr(pipe, name, None) is None]:
            raise UserError(
                f"the {type(pipe).__name__} has no {missing[0]}; its prompts need {', '.join(needed)}: load the whole "
                "pipeline"
            )
        self.pipe = pipe
        self._check_tokenizers()
        denoiser: Any = getattr(pipe, self.denoiser_name)
        self.denoiser, self.dtype = denoiser, denoiser.dtype
        self.device = next(denoiser.parameters()).device
        self.sample_shape = sample_shape
        self.pixels_per_latent: int = pipe.vae_scale_factor
        self._encoded: dict[str, Conditioning] = {}

    def _check_tokenizers(self) -> None:
        """Raises UserError for a tokenizer loaded without its files: it knows no words or, for CLIP, no length."""
        for name in self.encoder_names:
            encoder, kind = getattr(self.pipe, name), name.replace("text_encoder", "tokenizer")
            if encoder is None:
                continue
            tokenizer, config = getattr(self.pipe, kind), encoder.config
            clip = config.model_type == "clip_text_model"
            endless = clip and tokenizer.model_max_length > config.max_position_embeddings
            if endless or len(tokenizer) <= len(tokenizer.all_special_tokens):
                what = "no length that the text encoder takes" if endless else "no words"
                raise UserError(f"the model's {kind} knows {what}, for its files are missing; get the model again")

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (len(prompts), ...) on `device`, by the stock pipeline's own `encode_prompt`.

        One prompt at a time, so that a row does not depend on its batch. What was encoded is kept on the CPU.
        """
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]:
            for encoder in self.modules("encoders"):
                encoder.to(self.device)
            with torch.no_grad():
                self._encoded |= {prompt: self._encode(prompt, self.device).to("cpu") for prompt in new}
        return Conditioning.cat([self._encoded[prompt].to(self.device, self.dtype) for prompt in prompts])

    @abstractmethod
    def _encode(self, prompt: str, device: torch.device) -> Conditioning:
        """Conditioning of one prompt (1, ...); `device` is that of the text encoders."""

    def modules(self, part: Part) -> list[Any]:
        """The modules of the pipeline that a part of it is made of, those that are there."""
        names = {"encoders": self.encoder_names, "denoiser": (self.denoiser_name,), "vae": ("vae",)}[part]
        return [module for name in names if (module := getattr(self.pipe, name)) is not None]

    def place(self, *parts: Part) -> None:
        """Puts these parts on `device` and all others on the CPU, those first; prompts encoded so far stay usable."""
        for part in get_args(Part):
            if part not in parts:
                for module in self.modules(part):
                    module.to("cpu")
        for part in parts:
            for module in self.modules(part):
                module.to(self.device)

    def decoded_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of what the VAE decodes to a picture of the model's own size."""
        height, width = (edge * self.pixels_per_latent // self.pipe.vae_scale_factor for edge in self.sample_shape[1:])
        return self.pipe.vae.config.latent_channels, height, width

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square pictures; see `Family.latent_shape`."""
        if size is None:
            return self.sample_shape
        multiple = self.pixels_per_latent * self.patch
        if size < multiple or size % multiple:
            near = max(1, round(size / multiple)) * multiple
            raise UserError(f"trajectory.size={size}: allowed: multiples of {multiple} pixels, such as {near}")
        edge = size // self.pixels_per_latent
        return self.sample_shape[0], edge, edge

    def render(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W), float32, by the VAE decoder; see `Family.render`."""
        vae = self.pipe.vae
        images = vae.decode(self._vae_latents(latents.to(vae.device)).to(vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    def _vae_latents(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, of the latents (b, c, h, w) that the denoiser makes."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Clean latents of pictures by the VAE encoder; see `Family.encode_images`."""
        vae, multiple = self.pipe.vae, self.pixels_per_latent * self.patch
        if any(edge % multiple for edge in images.shape[-2:]):
            height, width = images.shape[-2:]
            raise UserError(f"a picture of {width} x {height} pixels: allowed: edges that are multiples of {multiple}")
        pixels = (2 * images - 1).to(vae.device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        found = posterior.mode().float()
        if generators is not None:
            found = found + posterior.std.float() * seeding.normal(generators, found.shape[1:]).to(found)
        return self._from_vae(found).to(self.device)

    def _from_vae(self, latents: Tensor) -> Tensor:
        """What `_vae_latents` undoes: latents of the denoiser, of those of the VAE (b, c, h, w)."""
        config = self.pipe.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def _reader(self) -> tuple[Any, int]:
        """The tokenizer whose encoder reads most of a prompt, and the most tokens it takes."""
        return self.pipe.tokenizer, self.pipe.tokenizer.model_max_length

    def token_spans(self, prompt: str) -> list[list[Span | None]]:
        """Which characters of a prompt each text token stands for; see `Family.token_spans`."""
        return [spans(*self._reader(), prompt)]

    def unknown_words(self, prompts: Sequence[str]) -> list[str]:
        """Words and symbols, such as emoji, that the tokenizer spells out instead of knowing.

        A symbol counts as unknown when it becomes the unknown token or more pieces than it has characters: the
        bytes of one that was never seen. A word counts as unknown when it becomes the unknown token, when all
        its pieces are single characters, or, for a small tokenizer (made for a closed word list, not the
        49,408 entries of CLIP's), when it takes several pieces. CLIP splits many words it has seen often
        enough, so two pieces mean nothing there.
        """
        tokenizer = self.pipe.tokenizer
        small = len(tokenizer) < _WHOLE_VOCABULARY
        unknown: dict[str, None] = {}
        for word in (word for prompt in prompts for word in _WORD.findall(prompt.lower())):
            if unicodedata.category(word[0]).startswith("M"):  # an accent: part of the word before it
                continue
            pieces = [_bare(piece) for piece in tokenizer.tokenize(word)]
            spelled = len(pieces) > 1 and (small or all(len(piece) <= 1 for piece in pieces))
            if not re.match(r"\w", word):
                spelled = len(pieces) > len(word)
            if not pieces or spelled or tokenizer.unk_token in pieces:
                unknown[word] = None
        return list(unknown)

    def cut(self, prompts: Sequence[str]) -> dict[str, str]:
        """Prompts of more tokens than any text encoder takes, with the text that none of them reads."""
        return ends(*self._reader(), prompts)


def parameter_infos(module: nn.Module, role: Callable[[str], dict[str, Any]]) -> list[ParameterInfo]:
    """What every parameter of a module is, in its order.

    Args:
        module: the denoiser.
        role: stack, index, part, projection, block and, with two streams, stream of a parameter's full name.
    """
    kinds = {
        f"{module_name}.{name}".lstrip("."): _kind(owner)
        for module_name, owner in module.named_modules()
        for name, _ in owner.named_parameters(recurse=False)
    }
    return [
        ParameterInfo(name, parameter.numel(), tuple(parameter.shape), kinds[name], **role(name))
        for name, parameter in module.named_parameters()
    ]


def ends(tokenizer: Any, most: int, prompts: Sequence[str]) -> dict[str, str]:
    """Prompts of more than `most` tokens, each with the text beyond them."""
    tokens = {prompt: tokenizer(prompt, verbose=False).input_ids for prompt in prompts}
    return {  # as `encode_prompt` cuts: the end token keeps the last place
        prompt: tokenizer.decode(ids[most - 1 : -1]).strip() for prompt, ids in tokens.items() if len(ids) > most
    }


def spans(tokenizer: Any, length: int, text: str) -> list[Span | None]:
    """The characters of a text that each of so many tokens stands for; None for special tokens and padding.

    Raises:
        UserError: the tokenizer does not tell.
    """
    try:
        read = tokenizer(
            text, padding="max_length", max_length=length, truncation=True, return_offsets_mapping=True
        )["offset_mapping"]  # fmt: skip
    except NotImplementedError:
        raise UserError(
            f"{type(tokenizer).__name__} does not tell which characters its tokens stand for; load the model with a "
            "fast tokenizer (tokenizer.json)"
        ) from None
    return [(begin, end) if end > begin else None for begin, end in read]


def _kind(module: nn.Module) -> str:
    """ "linear", "conv", "embedding", "norm" (whoever wrote it: torch's, diffusers') or "other"."""
    found = next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)
    return found or ("norm" if "Norm" in type(module).__name__ else "other")


def _bare(piece: str) -> str:
    """A token without the mark of where a word ends or begins."""
    for mark in _WORD_MARKS:
        piece = piece.removesuffix(mark) if mark == "</w>" else piece.removeprefix(mark)
    return piece
