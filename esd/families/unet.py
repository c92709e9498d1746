"""Stable Diffusion 1, 2 and XL: a UNet that predicts ε or v from text encoder states, under classifier-free
guidance.

SDXL adds a second text encoder, whose pooled state joins the time embedding, and "time ids" (original size,
crop, target size). SDXL-turbo is SDXL with another scheduler, sampled in one to four steps without guidance.

The parameter roles and presets restate upstream's name rules in terms of what a layer does; the tests
compare both.

Source: presets from rohitgandikota/erasing, esd_sd.py and esd_sdxl.py (the 2025 rules: Linear and Conv2d
modules only) and train-scripts/train-esd.py at a2189e9 (the 2023 rules: by parameter, norms included).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from esd.errors import UserError
from esd.selection import ParameterInfo, Preset

from . import pipeline
from .base import Conditioning, Denoiser, Null
from .diffusion import DiffusionFamily

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out"}
_RESNET = {
    "norm1": "norm1", "conv1": "conv1", "time_emb_proj": "time",
    "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "shortcut",
}  # fmt: skip
_ROOTS = {  # module -> stack, part
    "conv_in": ("in", "stem"), "conv_norm_out": ("out", "stem"), "conv_out": ("out", "stem"),
    "time_embedding": ("time", "embedding"), "add_embedding": ("time", "added"),
    "class_embedding": ("time", "class"),
}  # fmt: skip


class UNetFamily(DiffusionFamily):
    """What all families with a `UNet2DConditionModel` share.

    Args:
        pipe: the pipeline; only its denoiser is ever changed, and only by `esd.weights` or `esd.checkpoint`.

    Raises:
        UserError: see `DiffusionFamily`; or the UNet takes more than latents (inpainting) or is told a guidance
            scale (LCM).
    """

    denoiser_name: ClassVar[str] = "unet"
    presets: ClassVar[Mapping[str, Preset]] = {
        "esd_x": "cross & (linear + conv)",
        "esd_x_strict": "cross.k + cross.v",
        "esd_u": "(linear + conv) - cross",
        "esd_all": "linear + conv",
        "esd_x_2023": "cross",
        "esd_u_2023": "all - out - cross - time",
        "esd_all_2023": "all",
        "self_attention": "self",
    }

    def __init__(self, pipe: Any) -> None:
        config = pipe.unet.config
        if config.in_channels != config.out_channels:
            raise UserError(
                f"the UNet takes {config.in_channels} channels and returns {config.out_channels}: an "
                "inpainting or editing model; use a text-to-image base"
            )
        if config.get("time_cond_proj_dim") is not None:
            raise UserError(
                f"the UNet has time_cond_proj_dim={config.time_cond_proj_dim}: a latent consistency model, which is "
                "told its guidance scale; use the base it was distilled from"
            )
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__(pipe, (config.in_channels, height, width))

    def channels_last(self) -> None:
        """Lays the weights of UNet and VAE out as convolutions on cards like them."""
        modules: tuple[Any, ...] = (self.denoiser, self.pipe.vae)
        for module in modules:
            module.to(memory_format=torch.channels_last)

    def parameter_infos(self) -> list[ParameterInfo]:
        """The role of every UNet parameter, in the model's order."""
        return parameter_infos(self.denoiser)

    def embedding_tables(self) -> list[nn.Embedding]:
        """The table of token embeddings of each text encoder."""
        return [encoder.get_input_embeddings() for encoder in self.modules("encoders")]

    def embeddings_of(self, word: str) -> list[Tensor]:
        """What the tables of the text encoders hold for a word [(d,), ...].

        Raises:
            UserError: the word is several tokens.
        """
        found = []
        for words, table in zip(self._tokenizers(), self.embedding_tables(), strict=True):
            numbers = words(word, add_special_tokens=False).input_ids
            if len(numbers) != 1:
                pieces = " + ".join(words.convert_ids_to_tokens(numbers))
                raise UserError(f"{word!r} is several tokens ({pieces}); allowed: words that the tokenizer knows whole")
            found.append(table.weight[numbers[0]].detach().clone())
        return found

    def unused_word(self, prompts: Sequence[str]) -> str:
        """A word of letters that each tokenizer knows as one token, which no prompt has.

        Raises:
            UserError: the vocabulary has none.
        """
        used = {number for words in self._tokenizers() for text in prompts for number in words(text).input_ids}
        first = self._tokenizers()[0]
        for token in sorted(first.get_vocab()):
            word = token.removesuffix("</w>")
            if len(word) > 1 and re.fullmatch("[a-z]+</w>", token):
                numbers = [words(word, add_special_tokens=False).input_ids for words in self._tokenizers()]
                if all(len(one) == 1 and one[0] not in used for one in numbers):
                    return word
        raise UserError("the prompts use every whole word that the tokenizer knows; give fewer prompts")

    def encode_with(self, prompts: Sequence[str], word: str, embeddings: Sequence[Tensor]) -> Conditioning:
        """Conditioning (len(prompts), ...) with other embeddings for one word; gradients flow to them.

        The encoders' tables are not touched, and nothing is kept: `encode` gives what it gave before.

        Args:
            prompts: texts that hold the word, which is one token of each tokenizer.
            word: see `unused_word`.
            embeddings: (d,) for each text encoder, in the order of `encoder_names`.
        """

        def instead(number: int, embedding: Tensor) -> Callable[..., Tensor]:
            def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
                return torch.where((args[0] == number)[..., None], embedding.to(output), output)

            return hook

        tables = self.embedding_tables()
        with ExitStack() as hooks:
            for words, table, embedding in zip(self._tokenizers(), tables, embeddings, strict=True):
                (number,) = words(word, add_special_tokens=False).input_ids
                hooks.callback(table.register_forward_hook(instead(number, embedding)).remove)
            rows = [self._encode(prompt, tables[0].weight.device) for prompt in prompts]
        return Conditioning.cat(rows).to(self.device, self.dtype)

    def _tokenizers(self) -> list[Any]:
        """One for each text encoder."""
        return [getattr(self.pipe, name.replace("text_encoder", "tokenizer")) for name in self.encoder_names]


class StableDiffusion(UNetFamily):
    """Family of `StableDiffusionPipeline`, which is Stable Diffusion 1 and 2."""

    name: ClassVar[str] = "stable-diffusion"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)

    def _encode(self, prompt: str, device: torch.device) -> Conditioning:
        """{"encoder_hidden_states": (1, n, d)}."""
        return Conditioning({"encoder_hidden_states": self.pipe.encode_prompt(prompt, device, 1, False)[0]})

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """ε or v, float32 (b, c, h, w); see `Family.predict`."""
        states = cond.tensors["encoder_hidden_states"]
        return denoiser(x.to(self.dtype), t, encoder_hidden_states=states, return_dict=False)[0].float()


class StableDiffusionXL(UNetFamily):
    """Family of `StableDiffusionXLPipeline`, SDXL-turbo included."""

    name: ClassVar[str] = "stable-diffusion-xl"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    presets: ClassVar[Mapping[str, Preset]] = {  # esd_sdxl.py: 'block' and not 'emb' in the name
        **UNetFamily.presets,
        "esd_u": "(linear + conv) - cross - in - out - time - resnet.time",
        "esd_all": "(linear + conv) - in - out - time - resnet.time",
    }
    preset_notes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("esd_u", "esd_all"),
        "on SDXL, as upstream has it, neither the first and last convolution nor anything that reads the time",
    )

    def null(self, kind: Null | None = None) -> Conditioning:
        """One row; by default zeros, as the stock pipeline has it where `force_zeros_for_empty_prompt` is set.

        Upstream's esd_sdxl.py rolls out with zeros, but takes the empty prompt in the target.
        """
        empty = self.encode([""])
        if kind == "empty" or (kind is None and not self.pipe.config.force_zeros_for_empty_prompt):
            return empty
        return Conditioning({name: torch.zeros_like(tensor) for name, tensor in empty.tensors.items()})

    def advice(self, num_steps: int, guidance_scale: float) -> list[str]:
        """Tells who guides a model that was distilled to need no guidance: legal, and upstream's habit."""
        solver = self.pipe.scheduler
        turbo = isinstance(solver, diffusers.EulerAncestralDiscreteScheduler)
        if turbo and solver.config.timestep_spacing == "trailing" and guidance_scale > 1:
            return [
                f"guidance_scale={guidance_scale:g}: a turbo model is sampled without guidance in 1 to 4 steps; "
                "0 does that"
            ]
        return super().advice(num_steps, guidance_scale)

    def _encode(self, prompt: str, device: torch.device) -> Conditioning:
        """{"encoder_hidden_states": (1, n, d), "text_embeds": (1, p)}, p of the second encoder's pooled state."""
        states, _, pooled, _ = self.pipe.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        return Conditioning({"encoder_hidden_states": states, "text_embeds": pooled})

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """ε or v, float32 (b, c, h, w); the time ids say: a whole picture of this size. See `Family.predict`."""
        height, width = (edge * self.pixels_per_latent for edge in x.shape[-2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=self.dtype, device=x.device)
        added = {"text_embeds": cond.tensors["text_embeds"], "time_ids": ids.expand(len(x), -1)}
        told = {"encoder_hidden_states": cond.tensors["encoder_hidden_states"], "added_cond_kwargs": added}
        return denoiser(x.to(self.dtype), t, return_dict=False, **told)[0].float()

    def _vae_latents(self, latents: Tensor) -> Tensor:
        """Some VAEs for SDXL come with a mean and a deviation of each channel."""
        if (found := self._statistics(latents)) is None:
            return super()._vae_latents(latents)
        means, stds = found
        return latents * stds / self.pipe.vae.config.scaling_factor + means

    def _from_vae(self, latents: Tensor) -> Tensor:
        """Takes the same mean and deviation off."""
        if (found := self._statistics(latents)) is None:
            return super()._from_vae(latents)
        means, stds = found
        return (latents - means) * self.pipe.vae.config.scaling_factor / stds

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation (1, c, 1, 1) of each channel, where the VAE comes with them."""
        config = self.pipe.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return None
        means, stds = (like.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return means, stds


def parameter_infos(unet: nn.Module) -> list[ParameterInfo]:
    """The role of every parameter of a `UNet2DConditionModel`, in the model's order."""
    return pipeline.parameter_infos(unet, _role)


def _role(name: str) -> dict[str, Any]:
    """Stack, index, part, projection and block of a UNet parameter, read off its name."""
    words = name.split(".")
    if words[0] in _ROOTS:
        stack, part = _ROOTS[words[0]]
        return {"stack": stack, "index": None, "part": part, "projection": None, "block": words[0]}
    if words[0] == "mid_block":
        stack, index, inside = "mid", 0, words[1:]
    elif words[0] in ("down_blocks", "up_blocks"):
        stack, index, inside = words[0].removesuffix("_blocks"), int(words[1]), words[2:]
    else:
        return {"stack": "other", "index": None, "part": "other", "projection": None, "block": words[0]}
    part, projection = _inside(inside)
    # down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k -> down.1.attentions.0.block.0
    depth = 4 if "transformer_blocks" in inside else 2
    block = ".".join([stack, str(index), *("block" if w == "transformer_blocks" else w for w in inside[:depth])])
    return {"stack": stack, "index": index, "part": part, "projection": projection, "block": block}


def _inside(words: list[str]) -> tuple[str, str | None]:
    """(part, projection) from the words after the block, such as attentions, 0, proj_in, weight."""
    if words[0] == "resnets":
        return "resnet", _RESNET.get(words[2])
    if words[0] in ("downsamplers", "upsamplers"):
        return "sampler", None
    if "transformer_blocks" not in words:  # GroupNorm, proj_in, proj_out around the transformer
        return ("prenorm", None) if words[2] == "norm" else ("proj", words[2].removeprefix("proj_"))
    layer = words[words.index("transformer_blocks") + 2 :]
    if layer[0] in ("attn1", "attn2"):
        return ("self" if layer[0] == "attn1" else "cross"), _ATTENTION.get(layer[1])
    if layer[0] == "ff":
        return "ff", "in" if layer[2] == "0" else "out"
    return "prenorm", None
