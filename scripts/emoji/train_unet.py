"""The denoiser: Stable Diffusion's UNet in small, on latents of the pool, trained together with CLIP's text tower.

    python scripts/emoji/train_unet.py          # -> data/emoji/unet/, data/emoji/text/

eps-prediction on SD's scaled-linear schedule, weighted min(SNR, 1) / SNR, a tenth of the captions empty for
classifier-free guidance. The weight is Hang et al.'s "min-SNR" (2023) with 1 in place of their 5: what a thing is gets
decided in noisy latents, and with 5 most of the gradient came from finish in nearly clean ones (28% of the things were
right after 8,000 updates with 5, 58% after 1,000 more with 1; n = 50).

The text tower begins as CLIP's and goes on learning here, so that every thing has an embedding of its own;
`train_clip.py --text data/emoji/text` then teaches CLIP's eye to agree with it. `--start checkpoints/emoji-sd` begins
both from published weights with a fresh optimiser, and takes autoencoder, tokenizer and judge from there too: nothing
but drawings and pool need be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from catalogue import PHRASINGS, STYLES, THINGS
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from files import counted, folder_digest, made_by, whole_folders
from pages import caption
from pool import Pool
from train_clip import tokenize
from train_vae import to_model, to_pictures
from training import Origin, Recipe, Stage, adopt, begin, command_line, history, tell
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
    for start in counted(range(0, len(pool), batch), "latents of the pool, in batches"):
        pixels = to_model(pool.images[start : start + batch], device)
        with torch.autocast(pixels.device.type, torch.bfloat16):
            parts.append(vae.encode(pixels).latent_dist.mode().float().cpu())
    return (torch.cat(parts) * vae.config.scaling_factor).half()


PARTS = ((UNet2DConditionModel, "unet"), (CLIPTextModel, "text"))
"""What a painter writes, and the folders it is written to."""
MAKERS = {"vae": "vae", "tokenizer": "clip"}
"""Folders of the data that the denoiser stands on -> the stages that make them."""


@dataclass(frozen=True)
class Painter:
    """What turns words into latents; `clip` is the runs that made the CLIP whose text tower `text` began as."""

    tokenizer: CLIPTokenizer
    text: CLIPTextModel
    unet: UNet2DConditionModel
    clip: list[dict[str, Any]]

    @staticmethod
    def load(data: Path, start: Path | None) -> Painter:
        """Return UNet and text tower as the pipeline `start` has them, or as an earlier run wrote them, or new ones.

        A new UNet goes with CLIP's text tower.
        """
        if start:
            unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet").float()
            text = CLIPTextModel.from_pretrained(start, subfolder="text_encoder").float()
            told = start
        elif (data / "state" / "unet").exists() and (data / "unet").exists() and (data / "text").exists():
            unet, text = (kind.from_pretrained(data / name) for kind, name in PARTS)
            told = data / "unet"
        else:
            unet, text = new_unet(), CLIPTextModel.from_pretrained(made_by("train_clip.py", data / "clip"))
            told = data / "clip"
        return Painter(CLIPTokenizer.from_pretrained(data / "tokenizer"), text, unet, history(told, "clip"))

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Return what the UNet reads of each caption, (b, 32, 128)."""
        return self.text(tokenize(self.tokenizer, captions).to(self.text.device)).last_hidden_state

    @torch.no_grad()
    def sample(self, captions: list[str], *, seed: int, steps: int = 20, guidance: float = 4.0) -> torch.Tensor:
        """Return latents (b, 4, 16, 16) drawn by DDIM under classifier-free guidance."""
        scheduler = new_scheduler()
        scheduler.set_timesteps(steps)
        wanted, null = self.encode(captions), self.encode([""])
        x = torch.randn(len(wanted), 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(wanted)
        both = torch.cat([null.expand_as(wanted), wanted])
        for t in scheduler.timesteps:
            with torch.autocast(x.device.type, torch.bfloat16):
                unconditional, conditional = self.unet(torch.cat([x, x]), t, both).sample.float().chunk(2)
            x = scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
        return x

    def save(self, stage: Stage, data: Path) -> None:
        """Write the UNet and the text tower, both or neither."""
        with whole_folders(data / "part.unet", data) as new:
            self.unet.save_pretrained(new / "unet")
            self.text.save_pretrained(new / "text")
            tell(new / "unet", {"clip": self.clip, **stage.runs})


def loss_of_denoising(
    painter: Painter, x0: torch.Tensor, captions: list[str], alpha_bar: torch.Tensor, seed: int
) -> torch.Tensor:
    """Return the squared error of the noise predicted in latents (b, 4, 16, 16), weighted min(SNR, 1) / SNR.

    The weight is paid in draws: time steps come as often as they weigh, so none is computed to count for little.
    """
    draw = torch.Generator(x0.device).manual_seed(seed)
    noise = torch.randn(x0.shape, generator=draw, device=x0.device)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=1) / snr
    t = torch.multinomial(weight, len(x0), replacement=True, generator=draw)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    with torch.autocast(x0.device.type, torch.bfloat16):
        predicted = painter.unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, painter.encode(captions)).sample
    return weight.mean() * (predicted.float() - noise).pow(2).mean()


@torch.no_grad()
def read(painter: Painter, vae: AutoencoderKL, judge: EmojiJudge, count: int = 50) -> str:
    """Return how many of a few pictures, in a phrasing kept from training, the judge reads as asked."""
    rng = np.random.default_rng(0)
    things = [THINGS[t].name for t in rng.integers(len(THINGS), size=count)]
    styles = [STYLES[s] for s in rng.integers(len(STYLES), size=count)]
    phrasing = PHRASINGS["held_out"]["both"][0]
    captions = [say(phrasing, {"thing": thing, "style": style}) for thing, style in zip(things, styles, strict=True)]
    latents = painter.sample(captions, seed=0)
    readings = judge(to_pictures(vae.decode(latents / vae.config.scaling_factor).sample))
    shows, in_style = readings.shows(things).mean(), readings.in_style(styles).mean()
    return f"{shows:.0%} things, {in_style:.0%} styles right of {count}"


def main() -> None:
    """Train, then publish the averaged weights; they are written at every report too, to be usable early."""
    parser = command_line(__doc__, steps=17_000, batch=32, lr=1e-3, seed=2)
    parser.add_argument("--scenes", type=float, default=0.4, help="share of pages with two things")
    args, pool = begin(parser)
    adopt(args, "unet", ("unet", "text"), ("vae", "tokenizer", "judge"))
    made_from = {part: folder_digest(made_by(f"train_{maker}.py", args.data / part)) for part, maker in MAKERS.items()}
    painter = Painter.load(args.data, args.start)
    both = torch.nn.ModuleDict({"unet": painter.unet, "text": painter.text}).to(args.device)
    recipe = Recipe(args.steps, args.batch, args.lr, warmup=200, ema=0.999, seed=args.seed, report_every=1000)
    stage = Stage("unet", both, recipe, args.data, Origin.of(args, recipe, pool=pool.digest(), **made_from))
    if stage.made(args.data / "unet"):
        return
    if args.start:
        painter.save(stage, args.data)  # so that this folder alone can be gone on with
    vae = AutoencoderKL.from_pretrained(args.data / "vae").float().to(args.device).eval()
    latents = encode_pool(pool, vae, args.device).to(args.device)
    alpha_bar = new_scheduler().alphas_cumprod.to(args.device)
    singles, scenes = np.flatnonzero(pool.second < 0), np.flatnonzero(pool.second >= 0)

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        shows_two = rng.random(recipe.batch) < args.scenes
        pick = np.where(shows_two, rng.choice(scenes, recipe.batch), rng.choice(singles, recipe.batch))
        captions = [caption(pool.page(int(i)), rng) for i in pick]
        x0 = latents[torch.from_numpy(pick)].float()
        return loss_of_denoising(painter, x0, captions, alpha_bar, seed=int(rng.integers(2**62)))

    def publish_and_read() -> str:
        painter.save(stage, args.data)
        judged = (args.data / "judge" / "config.json").exists()
        return read(painter, vae, EmojiJudge(args.data / "judge")) if judged else "no judge yet"

    stage.run(loss_of, publish_and_read)
    with stage.averaged():
        painter.save(stage, args.data)
    print(f"the UNet is in {args.data / 'unet'}, the text tower in {args.data / 'text'}")


if __name__ == "__main__":
    main()
