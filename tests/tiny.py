"""Tiny real Stable Diffusion 1 pipelines: parts from diffusers and transformers, random weights.

Built in milliseconds, so a test that changes weights makes its own; those in conftest.py are for reading.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "cat", "dog", "rose", "mosaic", "style", "photo", "of", "the", "in")
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 12  # tokens


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows WORDS whole and spells out every other one."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            merges += [] if merge in merges else [merge]
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocabulary += [] if pieces[0] in vocabulary else [pieces[0]]
    entries = {token: number for number, token in enumerate([*vocabulary, START, END])}
    pairs: Any = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=entries, merges=pairs, model_max_length=LENGTH)


def pipeline(
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    size: Literal["small", "large"] = "small",
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A pipeline with random weights, the same for the same arguments; PNDM as SD 1.4 has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=16,
                bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        ).eval()  # fmt: skip
        for parameter in text.parameters():  # CLIP's own initialisation makes all tiny prompts nearly alike
            parameter.data *= 5 if parameter.ndim > 1 else 1
        unet = UNet2DConditionModel(**_UNETS[size], cross_attention_dim=16, norm_num_groups=4)
        vae = AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text, tokenizer=words, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


_UNETS: dict[str, dict[str, Any]] = {
    "small": {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "large": {
        "sample_size": 16, "block_out_channels": (8, 16, 24), "layers_per_block": 2, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}  # fmt: skip
