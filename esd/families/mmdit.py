"""Stable Diffusion 3 and 3.5, FLUX.1 and FLUX.2 Klein: transformers over text and image tokens at once (MMDiT)
that predict the velocity of a rectified flow.

None of them has cross-attention: text and image tokens attend to one another in *joint* attention. In
"double" blocks each stream has its own weights (image: to_q, to_k, to_v; text: add_q_proj, ...), in "single"
blocks both share them. Presets named for cross-attention therefore mean joint attention here, and say so.

Latents are kept as pictures (b, c, h, w), whatever a pipeline packs; packing, position ids and the schedule's
shift, which depends on the number of image tokens, are worked out from their shape.

Source: diffusers' pipelines of the same names, which the tests compare with; presets of FLUX from
rohitgandikota/erasing at 2ff19a1 (2026).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional

from esd.errors import UserError
from esd.selection import ParameterInfo, Preset

from .base import Conditioning, Denoiser, Guidance, Span, check_steps
from .pipeline import PipelineFamily, ends, parameter_infos, spans

_STACKS = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
_ROOTS: Mapping[str, tuple[str, str, str | None]] = {  # module -> stack, part, stream
    "pos_embed": ("in", "embedder", "image"), "x_embedder": ("in", "embedder", "image"),
    "context_embedder": ("in", "embedder", "text"),
    "time_text_embed": ("time", "embedding", None), "time_guidance_embed": ("time", "embedding", None),
    "double_stream_modulation_img": ("time", "modulation", "image"),
    "double_stream_modulation_txt": ("time", "modulation", "text"),
    "single_stream_modulation": ("time", "modulation", None),
    "norm_out": ("out", "modulation", None), "proj_out": ("out", "stem", None),
}  # fmt: skip
_ATTENTION = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "out", "norm_q": "norm_q", "norm_k": "norm_k",
    "add_q_proj": "add_q", "add_k_proj": "add_k", "add_v_proj": "add_v", "to_add_out": "add_out",
    "norm_added_q": "norm_add_q", "norm_added_k": "norm_add_k",
    "to_qkv_mlp_proj": "qkv_mlp",
}  # fmt: skip
_SINGLE = {"proj_mlp": ("ff", "in"), "proj_out": ("mixed", "out")}  # FLUX.1: attention and MLP leave together

_STRICT = "joint.k + joint.v + joint.add_k + joint.add_v"
_NO_CROSS = "there is no cross-attention: text and image meet in joint attention; say joint, joint.add_k, text.ff"


class FlowFamily(PipelineFamily):
    """What all families with a rectified-flow transformer share.

    Args:
        pipe: the pipeline; only its denoiser is ever changed, and only by `esd.weights` or `esd.checkpoint`.
        sample_shape: (c, h, w) of a latent of the model's own size.

    Raises:
        UserError: the scheduler is not the flow-matching Euler these models come with, or a text encoder is
            missing.
    """

    denoiser_name: ClassVar[str] = "transformer"
    aliases: ClassVar[Mapping[str, str]] = {"attn": "joint"}
    absent: ClassVar[Mapping[str, str]] = {"cross": _NO_CROSS, "attn2": _NO_CROSS}
    max_tokens: int  # of a prompt, as the stock pipeline's `max_sequence_length`

    def __init__(self, pipe: Any, sample_shape: tuple[int, int, int]) -> None:
        if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            raise UserError(
                f"the scheduler is a {type(pipe.scheduler).__name__}; {type(pipe).__name__} is sampled here with "
                "FlowMatchEulerDiscreteScheduler, which it comes with"
            )
        super().__init__(pipe, sample_shape)
        self.prediction_type = "flow"
        self.guidance: Guidance = "cfg"

    def scheduler(self, num_steps: int, name: str | None = None, latent_shape: Sequence[int] | None = None) -> Any:
        """A fresh flow-matching Euler scheduler, shifted for latents (c, h, w); see `Family.scheduler`."""
        config: Any = self.pipe.scheduler.config
        check_steps(num_steps, config.num_train_timesteps)
        if name not in (None, "euler"):
            raise UserError(f"scheduler is {name!r}; allowed: euler, or none for the model's own, which is the same")
        _, height, width = latent_shape or self.sample_shape
        scheduler = type(self.pipe.scheduler).from_config(config)
        tokens = (height // self.patch) * (width // self.patch)
        scheduler.set_timesteps(device=self.device, **self._schedule(num_steps, tokens))
        if not scheduler.timesteps.isfinite().all():
            low, high = config.get("base_image_seq_len"), config.get("max_image_seq_len")
            raise UserError(
                f"{height} x {width} latents are {tokens} image tokens, for which the scheduler, meant to shift for "
                f"{low} to {high}, has no finite times; draw a smaller size"
            )
        return scheduler

    def partly_read(self, prompts: Sequence[str]) -> dict[str, str]:
        """Where T5 reads beside CLIP, which stops at 77 tokens; see `Family.partly_read`."""
        first = self.pipe.tokenizer
        return {} if self._reader()[0] is first else ends(first, first.model_max_length, prompts)

    @abstractmethod
    def _schedule(self, num_steps: int, tokens: int) -> dict[str, Any]:
        """What the stock pipeline passes to `set_timesteps` for so many image tokens."""

    def _shift(self, tokens: int, max_shift: float) -> float:
        """mu of a schedule that shifts with the picture's size: linear in the number of image tokens.

        Source: `calculate_shift` in diffusers' pipelines; `max_shift` is their default where a config has none.
        """
        config = self.pipe.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
        return base + (most - base) * (tokens - low) / (high - low)

    def first_latents(self, scheduler: Any, noise: Tensor) -> Tensor:
        """The noise itself: a flow starts at σ = 1."""
        return noise

    def model_input(self, scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
        """The latents themselves: flows are not rescaled."""
        return x

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - σ, σ) with σ = t over the number of training times."""
        sigma = (t.float() / self.pipe.scheduler.config.num_train_timesteps).clamp(0, 1)
        return 1 - sigma, sigma

    def parameter_infos(self) -> list[ParameterInfo]:
        """The role of every parameter of the transformer, in the model's order."""
        return parameter_infos(self.denoiser, _role)


class StableDiffusion3(FlowFamily):
    """Family of `StableDiffusion3Pipeline`: Stable Diffusion 3 and 3.5, under classifier-free guidance.

    SD 3.5 medium's `attn2` is a second attention of the image stream to itself, role `self`.
    """

    name: ClassVar[str] = "stable-diffusion-3"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_encoders: ClassVar[tuple[str, ...]] = ("text_encoder_3",)  # the pipeline reads zeros for T5
    text_first: ClassVar[bool] = False
    segments: ClassVar[tuple[str, ...]] = ("CLIP", "T5")
    aliases: ClassVar[Mapping[str, str]] = {"attn": "joint", "attn2": "self"}
    absent: ClassVar[Mapping[str, str]] = {"cross": _NO_CROSS}
    presets: ClassVar[Mapping[str, Preset]] = {
        "esd_x": "joint & linear",
        "esd_x_strict": _STRICT,
        "esd_u": "(linear + conv) - joint",
        "esd_all": "linear + conv",
        "self_attention": "self",
    }
    preset_notes: ClassVar[Mapping[str, str]] = {
        "esd_x": "SD3 has no cross-attention; this is joint attention of both streams. attn2 of SD 3.5 medium is image "
        "self-attention and belongs to esd_u",
        "esd_x_strict": "keys and values of joint attention, of the image (to_k, to_v) and of the text (add_k_proj, "
        "add_v_proj)",
        "esd_u": "all but joint attention; attn2 of SD 3.5 medium, image self-attention, is in it",
    }
    max_tokens: int = 256

    def __init__(self, pipe: Any) -> None:
        config = pipe.transformer.config
        super().__init__(pipe, (config.in_channels, config.sample_size, config.sample_size))
        self.patch = config.patch_size

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(c, h, w), no larger than the position embedding; see `Family.latent_shape`."""
        shape = super().latent_shape(size)
        most = self.pipe.transformer.config.pos_embed_max_size * self.patch
        if shape[1] > most:
            raise UserError(
                f"trajectory.size={size}: allowed: at most {most * self.pixels_per_latent} pixels, as far as the "
                "model's position embedding reaches"
            )
        return shape

    def _reader(self) -> tuple[Any, int]:
        """T5 reads 256 tokens where the CLIP encoders stop at 77; without T5 it is CLIP."""
        return super()._reader() if self.pipe.text_encoder_3 is None else (self.pipe.tokenizer_3, self.max_tokens)

    def token_spans(self, prompt: str) -> list[list[Span | None]]:
        """Tokens of both CLIP encoders at once, and T5's after them; see `Family.token_spans`."""
        first, last = self.pipe.tokenizer, self.pipe.tokenizer_3
        read: list[Span | None]
        read = [None] * self.max_tokens if self.pipe.text_encoder_3 is None else spans(last, self.max_tokens, prompt)
        return [spans(first, first.model_max_length, prompt), read]

    def _encode(self, prompt: str, device: torch.device) -> Conditioning:
        """{"encoder_hidden_states": (1, n, d), "pooled_projections": (1, p)}."""
        how = {"device": device, "do_classifier_free_guidance": False, "max_sequence_length": self.max_tokens}
        states, _, pooled, _ = self.pipe.encode_prompt(prompt, None, None, **how)
        return Conditioning({"encoder_hidden_states": states, "pooled_projections": pooled})

    def _schedule(self, num_steps: int, tokens: int) -> dict[str, Any]:
        """A fixed shift, or one that grows with the picture where the scheduler's config says so."""
        shifts = self.pipe.scheduler.config.get("use_dynamic_shifting")
        return {"num_inference_steps": num_steps} | ({"mu": self._shift(tokens, 1.16)} if shifts else {})

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity, float32 (b, c, h, w); see `Family.predict`."""
        return denoiser(x.to(self.dtype), timestep=t.expand(len(x)), return_dict=False, **cond.tensors)[0].float()


class _FluxFamily(FlowFamily):
    """What FLUX.1 and FLUX.2 share: tokens of 2 x 2 latents, position ids, sigmas spaced evenly before the shift."""

    time_unit: ClassVar[float] = 1000.0
    stacks_passes: ClassVar[bool] = False

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity, float32 (b, c, h, w); see `Family.predict`."""
        grid = functional.pixel_unshuffle(x, self.patch)  # (b, c patch², h / patch, w / patch), one token a cell
        text = cond.tensors["encoder_hidden_states"].shape[1]
        tokens = denoiser(
            grid.flatten(2).mT.to(self.dtype),
            timestep=t.expand(len(x)).to(self.dtype) / self.time_unit,
            txt_ids=self._text_ids(text).to(x.device),
            img_ids=self._image_ids(*grid.shape[2:]).to(x.device),
            return_dict=False,
            **cond.tensors,
        )[0].float()
        return functional.pixel_shuffle(tokens.mT.unflatten(2, grid.shape[2:]), self.patch)

    @abstractmethod
    def _text_ids(self, count: int) -> Tensor:
        """Position ids of the text tokens (count, axes)."""

    @abstractmethod
    def _image_ids(self, height: int, width: int) -> Tensor:
        """Position ids of the image tokens (height width, axes), row by row."""

    @abstractmethod
    def _mu(self, num_steps: int, tokens: int) -> float:
        """How far the schedule is shifted towards noise."""

    def _schedule(self, num_steps: int, tokens: int) -> dict[str, Any]:
        """As both pipelines have it; a scheduler that does not shift ignores mu."""
        mu = self._mu(num_steps, tokens)
        if self.pipe.scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": num_steps, "mu": mu}
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps), "mu": mu}


class Flux(_FluxFamily):
    """Family of `FluxPipeline`: FLUX.1-dev, which is told its guidance scale, and FLUX.1-schnell, which has none."""

    name: ClassVar[str] = "flux"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    presets: ClassVar[Mapping[str, Preset]] = {
        "esd_x": "joint & linear",
        "esd_x_strict": _STRICT,
        "esd_u": "linear - joint",
        "esd_all": "linear",
    }
    preset_notes: ClassVar[Mapping[str, str]] = {
        "esd_x": "FLUX has no cross-attention; this is joint attention, in double and single blocks (upstream: 'attn' "
        "in the name)",
        "esd_x_strict": "keys and values of joint attention, of the text in double blocks (add_k_proj, add_v_proj) "
        "too; upstream's FLUX.1 script leaves those out: joint.k + joint.v",
        "esd_u": "all linear layers but joint attention",
    }
    patch: int = 2
    max_tokens: int = 512

    def __init__(self, pipe: Any) -> None:
        edge = pipe.default_sample_size  # 128: 1024 pixels
        super().__init__(pipe, (pipe.transformer.config.in_channels // 4, edge, edge))
        self.guidance = "distilled" if pipe.transformer.config.guidance_embeds else "none"

    def with_guidance(self, cond: Conditioning, scale: float) -> Conditioning:
        """For FLUX.1-dev, the conditioning at another embedded guidance scale; see `Family.with_guidance`."""
        told = cond.tensors.get("guidance")
        if told is None or bool((told == torch.tensor(scale, dtype=told.dtype)).all()):
            return cond
        return Conditioning({**cond.tensors, "guidance": torch.full_like(told, scale)})

    def _reader(self) -> tuple[Any, int]:
        """T5; CLIP gives one pooled vector only, of the first 77 tokens."""
        return self.pipe.tokenizer_2, self.max_tokens

    def _encode(self, prompt: str, device: torch.device) -> Conditioning:
        """{"encoder_hidden_states": (1, n, d), "pooled_projections": (1, p)}; dev also "guidance": (1,), which is 1."""
        states, pooled, _ = self.pipe.encode_prompt(prompt, device=device, max_sequence_length=self.max_tokens)
        told = {"guidance": torch.ones(1, device=device)} if self.guidance == "distilled" else {}
        return Conditioning({"encoder_hidden_states": states, "pooled_projections": pooled} | told)

    def _text_ids(self, count: int) -> Tensor:
        return torch.zeros(count, 3)

    def _image_ids(self, height: int, width: int) -> Tensor:
        return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).float()

    def _mu(self, num_steps: int, tokens: int) -> float:
        return self._shift(tokens, 1.15)


class Flux2Klein(_FluxFamily):
    """Family of `Flux2KleinPipeline`: the base model under classifier-free guidance, the distilled one under none.

    Its latents are those of the VAE in 2 x 2 cells, normalised: (b, 4 c, h / 2, w / 2), one token each.
    """

    name: ClassVar[str] = "flux2-klein"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    presets: ClassVar[Mapping[str, Preset]] = Flux.presets
    preset_notes: ClassVar[Mapping[str, str]] = {
        "esd_x": "FLUX has no cross-attention; this is joint attention, in double and single blocks. Single blocks "
        "fuse it with their MLP (to_qkv_mlp_proj, to_out), which is trained with it",
        "esd_x_strict": "keys and values of joint attention, of image and text, in double blocks; single blocks fuse "
        "theirs with queries and MLP",
        "esd_u": "all linear layers but joint attention, and so without the MLPs of single blocks",
    }
    max_tokens: int = 512

    def __init__(self, pipe: Any) -> None:
        edge = pipe.default_sample_size // 2  # 64: 1024 pixels
        super().__init__(pipe, (pipe.transformer.config.in_channels, edge, edge))
        self.pixels_per_latent = 2 * pipe.vae_scale_factor
        self.guidance = "none" if pipe.config.is_distilled else "cfg"

    def _encode(self, prompt: str, device: torch.device) -> Conditioning:
        """{"encoder_hidden_states": (1, n, d)}."""
        states, _ = self.pipe.encode_prompt(prompt, device=device, max_sequence_length=self.max_tokens)
        return Conditioning({"encoder_hidden_states": states})

    def cut(self, prompts: Sequence[str]) -> dict[str, str]:
        """As `Family.cut`; the prompt stands inside a chat template, whose tokens count."""
        tokenizer, ends = self.pipe.tokenizer, dict[str, str]()
        for prompt in prompts:
            text = self._in_template(prompt)
            found = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
            if len(found) > self.max_tokens:
                end = prompt[max(0, found[self.max_tokens][0] - text.index(prompt)) :].strip()
                ends |= {prompt: end} if end else {}  # else the template alone is cut
        return ends

    def token_spans(self, prompt: str) -> list[list[Span | None]]:
        """Tokens of the chat template stand for none of the prompt; see `Family.token_spans`."""
        text = self._in_template(prompt)
        begin = text.index(prompt)
        found = spans(self.pipe.tokenizer, self.max_tokens, text)
        shifted = [span and (max(span[0] - begin, 0), min(span[1] - begin, len(prompt))) for span in found]
        return [[span if span and span[0] < span[1] else None for span in shifted]]

    def _in_template(self, prompt: str) -> str:
        """The text that the encoder reads for a prompt."""
        template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return str(self.pipe.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **template))

    def _text_ids(self, count: int) -> Tensor:
        one = torch.arange(1)
        return torch.cartesian_prod(one, one, one, torch.arange(count))

    def _image_ids(self, height: int, width: int) -> Tensor:
        one = torch.arange(1)
        return torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)

    def _mu(self, num_steps: int, tokens: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # a fit, not a formula

        return compute_empirical_mu(image_seq_len=tokens, num_steps=num_steps)

    def _vae_latents(self, latents: Tensor) -> Tensor:
        """Undoes the normalisation, which the VAE keeps as batch statistics, and the cells."""
        mean, deviation = self._statistics(latents)
        return functional.pixel_shuffle(latents * deviation + mean, 2)

    def _from_vae(self, latents: Tensor) -> Tensor:
        """Cells, normalised."""
        cells = functional.pixel_unshuffle(latents, 2)
        mean, deviation = self._statistics(cells)
        return (cells - mean) / deviation

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (1, c, 1, 1) of each channel."""
        vae, shape = self.pipe.vae, (1, -1, 1, 1)
        deviation = (vae.bn.running_var.view(shape) + vae.config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.view(shape).to(like), deviation.to(like)


def _role(name: str) -> dict[str, Any]:
    """Stack, index, part, projection, stream and block of a transformer parameter, read off its name."""
    words = name.split(".")
    if words[0] not in _STACKS:
        stack, part, stream = _ROOTS.get(words[0], ("other", "other", None))
        return {"stack": stack, "index": None, "part": part, "projection": None, "stream": stream, "block": words[0]}
    stack, index = _STACKS[words[0]], int(words[1])
    part, projection = _inside(words[2:])
    text = words[2].endswith("_context") or (projection or "").startswith(("add_", "norm_add_"))
    stream = None if stack == "single" else "text" if text else "image"
    block = f"{stack}.{index}"
    return {"stack": stack, "index": index, "part": part, "projection": projection, "stream": stream, "block": block}


def _inside(words: list[str]) -> tuple[str, str | None]:
    """(part, projection) from the words after the block, such as attn, to_out, 0, weight."""
    if words[0] in ("attn", "attn2"):
        return ("joint" if words[0] == "attn" else "self"), _ATTENTION.get(words[1])
    if words[0] in ("ff", "ff_context"):  # net.0 and net.2, or FLUX.2's linear_in and linear_out
        return "ff", "in" if words[1] == "linear_in" or words[2] == "0" else "out"
    if words[0].startswith("norm"):
        return "modulation", None
    return _SINGLE.get(words[0], ("other", None))
