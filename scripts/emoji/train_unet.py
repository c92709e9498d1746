"""The denoiser: Stable Diffusion's UNet in small, on latents of the pool, trained together with CLIP's text tower.

    python scripts/emoji/train_unet.py          # -> data/emoji/unet/, data/emoji/text/

eps-prediction on SD's scaled-linear schedule, weighted min(SNR, 5) / SNR (Hang et al. 2023, "min-SNR"), a tenth of the
captions empty for classifier-free guidance. The text tower begins as CLIP's and goes on learning here, so that every
thing has an embedding of its own; `train_clip.py --text data/emoji/text` then teaches CLIP's eye to agree with it.
`--start checkpoints/emoji-sd` begins both from published weights with a fresh optimiser.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from catalogue import PHRASINGS, STYLES, THINGS
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from drawings import DATA
from pages import caption
from pool import Pool
from train_clip import tokenize
from train_vae import to_model, to_pictures
from training import Recipe, Stage
from transformers import CLIPTextModel, CLIPTokenizer

from esd.evaluation.judges import EmojiJudge
from esd.evaluation.prompts import say


def new_unet() -> UNet2DConditionModel:
    """Return the untrained UNet: three levels (16, 8, 4 pixels), cross-attention at every one."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 176),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule with the DDIM sampler."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


@torch.no_grad()
def encode_pool(pool: Pool, vae: AutoencoderKL, device: str, batch: int = 128) -> torch.Tensor:
    """Return the scaled latents of every page, float16 (n, 4, 16, 16)."""
    parts = []
    for start in range(0, len(pool), batch):
        pixels = to_model(pool.images[start : start + batch], device)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            parts.append(vae.encode(pixels).latent_dist.mode().float().cpu())
    return (torch.cat(parts) * vae.config.scaling_factor).half()


@torch.no_grad()
def sample(
    unet: torch.nn.Module,
    embeddings: torch.Tensor,
    null: torch.Tensor,
    *,
    seed: int,
    steps: int = 20,
    guidance: float = 4.0,
) -> torch.Tensor:
    """Return latents (b, 4, 16, 16) drawn by DDIM under classifier-free guidance."""
    scheduler = new_scheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(len(embeddings), 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(embeddings)
    both = torch.cat([null.expand_as(embeddings), embeddings])
    for t in scheduler.timesteps:
        with torch.autocast(x.device.type, torch.bfloat16):
            unconditional, conditional = unet(torch.cat([x, x]), t, both).sample.float().chunk(2)
        x = scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
    return x


def main() -> None:
    """Train; the averaged weights are written at every save, so that a usable model is there early."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--start", type=Path, help="a published pipeline to begin from, with a fresh optimiser")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=float, default=0.2, help="share of pages with two things")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(args.seed)
    pool = Pool.load(args.data / "pool.npz")
    vae = AutoencoderKL.from_pretrained(args.data / "vae").float().to(args.device).eval()
    latents = encode_pool(pool, vae, args.device).to(args.device)
    tokenizer = CLIPTokenizer.from_pretrained(args.data / "clip")
    if args.start:
        unet = UNet2DConditionModel.from_pretrained(args.start, subfolder="unet").float()
        text = CLIPTextModel.from_pretrained(args.start, subfolder="text_encoder")
    else:
        unet, text = new_unet(), CLIPTextModel.from_pretrained(args.data / "clip")
    both = torch.nn.ModuleDict({"unet": unet, "text": text}).to(args.device)
    recipe = Recipe(args.steps, args.batch, args.lr, warmup=200, ema=0.999, seed=args.seed, save_every=1000)
    stage = Stage("unet", both, recipe, args.data / "state")
    alpha_bar = new_scheduler().alphas_cumprod.to(args.device)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / snr
    singles, scenes = np.flatnonzero(pool.second < 0), np.flatnonzero(pool.second >= 0)

    def encode(captions: list[str]) -> torch.Tensor:
        return text(tokenize(tokenizer, captions).to(args.device)).last_hidden_state

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        pick = np.where(
            rng.random(recipe.batch) < args.scenes, rng.choice(scenes, recipe.batch), rng.choice(singles, recipe.batch)
        )
        captions = [caption(pool.page(int(i)), rng) for i in pick]
        draw = torch.Generator(args.device).manual_seed(int(rng.integers(2**62)))
        x0 = latents[torch.from_numpy(pick)].float()
        noise = torch.randn(x0.shape, generator=draw, device=args.device)
        t = torch.randint(0, 1000, (recipe.batch,), generator=draw, device=args.device)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast(x0.device.type, torch.bfloat16):
            predicted = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, encode(captions)).sample
        return (weight[t] * (predicted.float() - noise).pow(2).mean((1, 2, 3))).mean()

    @torch.no_grad()
    def publish_and_read() -> str:
        """Write the averaged weights; return the judge's reading of a few pictures, once there is a judge."""
        unet.save_pretrained(args.data / "unet")
        text.save_pretrained(args.data / "text")
        if not (args.data / "judge" / "config.json").exists():
            return "no judge yet"
        judge, rng = EmojiJudge(args.data / "judge"), np.random.default_rng(0)
        things, looks = rng.integers(len(THINGS), size=50), rng.integers(len(STYLES), size=50)
        names, styles = [THINGS[t].name for t in things], [STYLES[s] for s in looks]
        phrase = PHRASINGS["held_out"]["both"][0]
        captions = [say(phrase, {"thing": name, "style": style}) for name, style in zip(names, styles, strict=True)]
        drawn = sample(unet, encode(captions), encode([""]), seed=0)
        readings = judge(to_pictures(vae.decode(drawn / vae.config.scaling_factor).sample))
        return f"{readings.shows(names).mean():.0%} things, {readings.in_style(styles).mean():.0%} styles right of 50"

    stage.run(loss_of, publish_and_read)
    print(f"the UNet is in {args.data / 'unet'}, the text tower in {args.data / 'text'}")


if __name__ == "__main__":
    main()
