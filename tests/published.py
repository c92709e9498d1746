"""Models that people use, by the configurations published with them (`config.json` on the hub).

On the meta device of PyTorch, so that twelve billion parameters cost no memory: names and shapes are real, values are
not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from esd.families import Conditioning, family_of
from tests import tiny

SD14 = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SD21 = SD14 | {
    "sample_size": 96, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
    "use_linear_projection": True,
}  # fmt: skip
SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
KLEIN_4B = {
    "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000, "guidance_embeds": False,
}  # fmt: skip

DENOISERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SD 1.4": (UNet2DConditionModel, SD14),
    "SD 2.1": (UNet2DConditionModel, SD21),
    "SDXL": (UNet2DConditionModel, SDXL),
    "SD 3.5 medium": (SD3Transformer2DModel, SD35_MEDIUM),
    "FLUX.1-dev": (FluxTransformer2DModel, FLUX_DEV),
    "FLUX.2 Klein 4B": (Flux2Transformer2DModel, KLEIN_4B),
}


def denoiser(name: str) -> torch.nn.Module:
    """One of DENOISERS without values, or SDXL-turbo, which is SDXL for pictures of 512 pixels."""
    kind, config = DENOISERS[name.removesuffix("-turbo")]
    if name == "SDXL-turbo":
        config = config | {"sample_size": 64}
    with torch.device("meta"):
        return kind(**config)


def _clip(kind: type[Any], **config: Any) -> Any:
    return kind(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **config))


def _t5() -> Any:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _qwen3() -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _vae(kind: type[Any] = AutoencoderKL, channels: int = 4, **config: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    return kind(latent_channels=channels, **blocks, **widths, **config)


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_BIG_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
SPARE: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False}

# the other parts, by their names in the pipeline
PARTS: dict[str, dict[str, Callable[[], Any]]] = {
    "SD 1.4": {"text_encoder": lambda: _clip(CLIPTextModel, **CLIP_L), "vae": _vae},
    "SDXL": {
        "text_encoder": lambda: _clip(CLIPTextModel, **CLIP_L),
        "text_encoder_2": lambda: _clip(CLIPTextModelWithProjection, **CLIP_BIG_G),
        "vae": _vae,
    },
    "SD 3.5 medium": {
        "text_encoder": lambda: _clip(CLIPTextModelWithProjection, **CLIP_L, projection_dim=768),
        "text_encoder_2": lambda: _clip(CLIPTextModelWithProjection, **CLIP_BIG_G),
        "text_encoder_3": _t5,
        "vae": lambda: _vae(channels=16, **SPARE),
    },
    "FLUX.1-dev": {
        "text_encoder": lambda: _clip(CLIPTextModel, **CLIP_L),
        "text_encoder_2": _t5,
        "vae": lambda: _vae(channels=16, **SPARE),
    },
    "FLUX.2 Klein 4B": {"text_encoder": _qwen3, "vae": lambda: _vae(AutoencoderKLFlux2, 32)},
}

# of one prompt, as the pipelines encode it
CONDITIONING: dict[str, dict[str, tuple[int, ...]]] = {
    "SD 1.4": {"encoder_hidden_states": (1, 77, 768)},
    "SDXL": {"encoder_hidden_states": (1, 77, 2048), "text_embeds": (1, 1280)},
    "SD 3.5 medium": {"encoder_hidden_states": (1, 77 + 256, 4096), "pooled_projections": (1, 2048)},
    "FLUX.1-dev": {"encoder_hidden_states": (1, 512, 4096), "pooled_projections": (1, 768), "guidance": (1,)},
    "FLUX.2 Klein 4B": {"encoder_hidden_states": (1, 512, 7680)},
}
PARTS["SDXL-turbo"], CONDITIONING["SDXL-turbo"] = PARTS["SDXL"], CONDITIONING["SDXL"]
EXPERIMENTS = {  # in conf/experiment, with the published model each trains
    "sd14": "SD 1.4", "sdxl": "SDXL", "sdxl_turbo": "SDXL-turbo", "sd35_medium": "SD 3.5 medium",
    "flux_dev": "FLUX.1-dev", "flux_dev_24gb": "FLUX.1-dev", "klein": "FLUX.2 Klein 4B",
}  # fmt: skip
TINY = {  # pipelines of the same families
    "SD 1.4": "sd1", "SDXL": "sdxl", "SDXL-turbo": "sdxl-turbo", "SD 3.5 medium": "sd3.5", "FLUX.1-dev": "flux-dev",
    "FLUX.2 Klein 4B": "klein", "SD 2.1": "sd2-v",
}  # fmt: skip


def family(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The family of a published model, its parts without values; its tokenizers and scheduler are a tiny one's."""
    pipe = tiny.every(TINY[name])
    with torch.device("meta"):
        parts = {part: make() for part, make in PARTS[name].items()}
    parts["unet" if hasattr(pipe, "unet") else "transformer"] = denoiser(name)
    for part, module in parts.items():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        setattr(pipe, part, module)
    pipe.vae_scale_factor = 8
    if not hasattr(pipe, "unet"):
        pipe.default_sample_size = 128
    if TINY[name] == "flux-dev":  # whose schedule is shifted for tiny pictures
        pipe.scheduler.register_to_config(base_image_seq_len=256, max_image_seq_len=4096)
    return family_of(pipe, "cpu")


def conditioning(name: str) -> Conditioning:
    """Of one prompt, without values."""
    return Conditioning({part: torch.empty(shape, device="meta") for part, shape in CONDITIONING[name].items()})
