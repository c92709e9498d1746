"""Tiny real pipelines of every family: parts from diffusers and transformers, random weights.

Built in milliseconds, so a test that changes weights makes its own; those in conftest.py are for reading.
`pipeline` is Stable Diffusion 1, `PIPELINES` has the others by name; `TOKENS` are what T5 and Qwen3 read of a prompt.
`save_clip` and `save_resnet` leave networks that read pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "cat", "dog", "rose", "mosaic", "style", "photo", "of", "the", "in")
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 12  # tokens that CLIP reads
TOKENS = 24  # tokens that T5 and Qwen3 read where a test says so; their own 256 and 512 are slow


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


def clip(kind: type[Any], words: CLIPTokenizer) -> Any:
    """A CLIP text encoder of the class asked for, d = 16."""
    text = kind(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=16,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    ).eval()  # fmt: skip
    for parameter in text.parameters():  # CLIP's own initialisation makes all tiny prompts nearly alike
        parameter.data *= 5 if parameter.ndim > 1 else 1
    return text


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder, d = 32, and a tokenizer that knows WORDS and letters."""
    pieces = ["\u2581", *(f"\u2581{word}" for word in WORDS), *(chr(code) for code in range(33, 127))]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -1.0 / len(p)) for p in dict.fromkeys(pieces))]
    words = T5Tokenizer(vocab=scores, extra_ids=0)
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval(), words


def vae(shift: float | None = None) -> AutoencoderKL:
    """A VAE of 4 channels that halves pictures."""
    return AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=shift,
    ).eval()  # fmt: skip


def pipeline(
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    size: Literal["small", "large"] = "small",
    seed: int = 0,
) -> StableDiffusionPipeline:
    """A pipeline with random weights, the same for the same arguments; PNDM as SD 1.4 has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        text = clip(CLIPTextModel, words)
        unet = UNet2DConditionModel(**_UNETS[size], cross_attention_dim=16, norm_num_groups=4)
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=text, tokenizer=words, unet=unet.eval(), scheduler=scheduler,
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


def sdxl(turbo: bool = False) -> StableDiffusionXLPipeline:
    """SDXL with its Euler, or SDXL-turbo with ancestral Euler and trailing times."""
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=(2, 4), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True, cross_attention_dim=32,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    kind, spacing = (EulerAncestralDiscreteScheduler, "trailing") if turbo else (EulerDiscreteScheduler, "leading")
    scheduler = kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing=spacing, steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(CLIPTextModel, words), text_encoder_2=clip(CLIPTextModelWithProjection, words),
        tokenizer=words, tokenizer_2=tokenizer(), unet=unet.eval(), scheduler=scheduler,
    )  # fmt: skip


def sd3(dual: bool = False) -> StableDiffusion3Pipeline:
    """SD3, or SD 3.5 medium with its second attention in the first block and normalised queries and keys."""
    words, (reader, pieces) = tokenizer(), t5()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8, dual_attention_layers=(0,) if dual else (), qk_norm="rms_norm" if dual else None,
    )  # fmt: skip
    first, second = (clip(CLIPTextModelWithProjection, words) for _ in range(2))
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(0.06),
        text_encoder=first, tokenizer=words, text_encoder_2=second, tokenizer_2=tokenizer(),
        text_encoder_3=reader, tokenizer_3=pieces,
    )  # fmt: skip


def flux(dev: bool = True) -> FluxPipeline:
    """FLUX.1-dev, which is told its guidance and shifts its schedule, or FLUX.1-schnell."""
    words, (reader, pieces) = tokenizer(), t5()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=dev, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    # low sequence lengths, so that 16 tokens shift as some thousand do
    shift = {"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 32} if dev else {}
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"shift": 3.0 if dev else 1.0} | shift)), vae=vae(0.1),
        text_encoder=clip(CLIPTextModel, words), tokenizer=words, text_encoder_2=reader, tokenizer_2=pieces,
        transformer=transformer.eval(),
    )  # fmt: skip
    pipe.default_sample_size = 8  # a constant of the class: 128
    return pipe


def klein(distilled: bool = True) -> Flux2KleinPipeline:
    """FLUX.2 Klein, distilled or base; the 27 layers of Qwen3 that its prompts are read from."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Qwen2Tokenizer(vocab={token: i for i, token in enumerate([*alphabet, "<|endoftext|>"])}, merges=[])
    words.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    reader = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, initializer_range=0.2,
        )
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    transformer.context_embedder.weight.data *= 10  # a random Qwen3 reads all prompts nearly alike
    decoder = AutoencoderKLFlux2(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.5, 2.0)
    shift = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = Flux2KleinPipeline(
        scheduler=shift, vae=decoder, text_encoder=reader.eval(), tokenizer=words, transformer=transformer.eval(),
        is_distilled=distilled,
    )  # fmt: skip
    pipe.default_sample_size = 8
    return pipe


def pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma, which docs/add-a-family.md adds."""
    reader, pieces = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=32,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False)
    return PixArtSigmaPipeline(
        tokenizer=pieces, text_encoder=reader, vae=vae(), transformer=transformer.eval(), scheduler=scheduler
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd1": pipeline,
    "sd2-v": lambda: pipeline("v_prediction", "large", seed=1),
    "sdxl": sdxl,
    "sdxl-turbo": lambda: sdxl(turbo=True),
    "sd3": sd3,
    "sd3.5": lambda: sd3(dual=True),
    "flux-dev": flux,
    "flux-schnell": lambda: flux(dev=False),
    "klein": klein,
    "klein-base": lambda: klein(distilled=False),
}
OTHERS: dict[str, Callable[[], Any]] = {"pixart": pixart}  # what is tested as a family, and not as one to intervene in


def every(name: str, seed: int = 0) -> Any:
    """One of PIPELINES or OTHERS, its weights the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = (PIPELINES | OTHERS)[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save_clip(folder: Path) -> Path:
    """A CLIP that reads pictures and texts, with its tokenizer and preprocessor, in a folder, which it returns."""
    words = tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        folder
    )
    words.save_pretrained(folder)
    told = _HALF | {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "image_processor_type":
                    "CLIPImageProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def save_resnet(folder: Path) -> Path:
    """A ResNet of three labels, with its preprocessor, in a folder, which it returns."""
    torch.manual_seed(0)
    labels = {0: "tench, Tinca tinca", 1: "nsfw", 2: "sfw"}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=labels)
    ResNetForImageClassification(config).save_pretrained(folder)
    told = _HALF | {"size": {"height": 32, "width": 32}, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder
