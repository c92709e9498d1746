"""Stable Diffusion 1 and 2: a UNet that predicts ε or v from one text encoder's states, under
classifier-free guidance.

The parameter roles and presets restate upstream's name rules in terms of what a layer does; the tests
compare both.

Source: presets from rohitgandikota/erasing, esd_sd.py (the 2025 rules: Linear and Conv2d modules only) and
train-scripts/train-esd.py at a2189e9 (the 2023 rules: by parameter, norms included).
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from esd.errors import UserError
from esd.objectives import PredictionType
from esd.selection import ParameterInfo, Preset

from .base import Conditioning, Denoiser, Family, Guidance, check_steps

SCHEDULERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}

_WHOLE_VOCABULARY = 20_000  # a tokenizer with fewer entries was made for a closed list of words

# a word, or one symbol with what modifies it: variation selectors, skin tones, further emoji joined to it
_WORD = re.compile(r"\w+|[^\w\s](?:[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]|\u200d.)*")

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
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv2d, "conv"),
    (nn.GroupNorm, "norm"),
    (nn.LayerNorm, "norm"),
    (nn.Embedding, "embedding"),
)


class StableDiffusion(Family):
    """Family of `StableDiffusionPipeline` with a `UNet2DConditionModel`.

    Args:
        pipe: the pipeline; only its denoiser is ever changed, and only by `esd.weights` or `esd.checkpoint`.

    Raises:
        UserError: the scheduler's prediction type is neither epsilon nor v_prediction, or the UNet takes
            more than latents (inpainting).
    """

    name: ClassVar[str] = "stable-diffusion"
    guidance: ClassVar[Guidance] = "cfg"
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
        kind = pipe.scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise UserError(f"the scheduler predicts {kind!r}; supported: epsilon, v_prediction")
        config = pipe.unet.config
        if config.in_channels != config.out_channels:
            raise UserError(
                f"the UNet takes {config.in_channels} channels and returns {config.out_channels}: an "
                "inpainting or editing model; use a text-to-image base"
            )
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.pipe = pipe
        self.denoiser = pipe.unet
        self.prediction_type: PredictionType = kind
        self.sample_shape = (config.in_channels, height, width)
        self.dtype = pipe.unet.dtype
        self._encoded: dict[str, Tensor] = {}
        self._alpha_bars = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.float()

    def latent_shape(self, size: int | None = None) -> tuple[int, int, int]:
        """(c, h, w); a side is the picture's by the VAE's factor, 8 for Stable Diffusion. See `Family.latent_shape`."""
        if size is None:
            return self.sample_shape
        factor = self.pipe.vae_scale_factor
        if size < factor or size % factor:
            near = max(1, round(size / factor)) * factor
            raise UserError(f"trajectory.size={size}: allowed: multiples of {factor} pixels, such as {near}")
        return self.sample_shape[0], size // factor, size // factor

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """{"encoder_hidden_states": (len(prompts), n, d)}, by the stock pipeline's own `encode_prompt`.

        One prompt at a time, so that a row does not depend on its batch.
        """
        device = self.device
        for prompt in prompts:
            if prompt not in self._encoded:
                with torch.no_grad():
                    self._encoded[prompt] = self.pipe.encode_prompt(prompt, device, 1, False)[0]
        states = torch.cat([self._encoded[prompt].to(device) for prompt in prompts])
        return Conditioning({"encoder_hidden_states": states.to(self.dtype)})

    def release_encoders(self) -> None:
        """Moves the text encoder to the CPU; prompts encoded so far stay usable."""
        self.pipe.text_encoder.to("cpu")

    def recall_encoders(self) -> None:
        """Brings the text encoder back beside the UNet."""
        self.pipe.text_encoder.to(self.device)

    def scheduler(self, num_steps: int, name: str | None = None) -> Any:
        """A fresh scheduler made from the pipeline's configuration; see `Family.scheduler`."""
        config = self.pipe.scheduler.config
        check_steps(num_steps, config.num_train_timesteps)
        if name is None:
            scheduler = type(self.pipe.scheduler).from_config(config)
        elif name in SCHEDULERS:
            kind = getattr(diffusers, SCHEDULERS[name])
            takes_clip = "clip_sample" in inspect.signature(kind.__init__).parameters
            # latents are not confined to [-1, 1]: DDIM's and DDPM's default would clip them
            scheduler = kind.from_config(config, **({"clip_sample": False} if takes_clip else {}))
        else:
            raise UserError(f"scheduler is {name!r}; allowed: {', '.join(SCHEDULERS)}, or none for the model's own")
        scheduler.set_timesteps(num_steps, device=self.device)
        return scheduler

    def predict(self, denoiser: Denoiser, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """ε or v, float32 (b, c, h, w); see `Family.predict`."""
        states = cond.tensors["encoder_hidden_states"]
        return denoiser(x.to(self.dtype), t, encoder_hidden_states=states, return_dict=False)[0].float()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(ᾱ_t), sqrt(1 - ᾱ_t)); a fractional t, which Euler's times can be, interpolates ᾱ."""
        table = self._alpha_bars.to(t.device)
        t = t.float().clamp(0, len(table) - 1)
        low = t.floor().long()
        alpha_bar = torch.lerp(table[low], table[(low + 1).clamp_max(len(table) - 1)], t - low)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, H, W), float32 in [0, 1], by the VAE decoder."""
        vae = self.pipe.vae
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def parameter_infos(self) -> list[ParameterInfo]:
        """The role of every UNet parameter, in the model's order."""
        return parameter_infos(self.denoiser)

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
            pieces = [piece.removesuffix("</w>") for piece in tokenizer.tokenize(word)]
            spelled = len(pieces) > 1 and (small or all(len(piece) <= 1 for piece in pieces))
            if not re.match(r"\w", word):
                spelled = len(pieces) > len(word)
            if not pieces or spelled or tokenizer.unk_token in pieces:
                unknown[word] = None
        return list(unknown)

    def cut(self, prompts: Sequence[str]) -> dict[str, str]:
        """Prompts of more tokens than the tokenizer's `model_max_length`, with the text beyond it."""
        tokenizer = self.pipe.tokenizer
        most = tokenizer.model_max_length
        tokens = {prompt: tokenizer(prompt, verbose=False).input_ids for prompt in prompts}
        return {  # as `encode_prompt` cuts: the end token keeps the last place
            prompt: tokenizer.decode(ids[most - 1 : -1]).strip() for prompt, ids in tokens.items() if len(ids) > most
        }


def parameter_infos(unet: nn.Module) -> list[ParameterInfo]:
    """The role of every parameter of a `UNet2DConditionModel`, in the model's order."""
    kinds = {
        f"{module_name}.{name}".lstrip("."): next((k for kind, k in _KINDS if isinstance(module, kind)), "other")
        for module_name, module in unet.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    return [
        ParameterInfo(name, parameter.numel(), tuple(parameter.shape), kinds[name], **_role(name))
        for name, parameter in unet.named_parameters()
    ]


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
