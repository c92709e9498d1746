"""The denoisers of models that people use, by the configurations published with them (`config.json` on the hub).

On the meta device of PyTorch, so that twelve billion parameters cost no memory: names and shapes are real, values are
not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

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
    """One of DENOISERS without values."""
    kind, config = DENOISERS[name]
    with torch.device("meta"):
        return kind(**config)
