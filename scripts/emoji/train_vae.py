"""The autoencoder: 64 x 64 x 3 pictures to 16 x 16 x 4 latents, trained on the pool.

    python scripts/emoji/train_vae.py           # -> data/emoji/vae/

Loss: L1 + L1 of the image gradients + 1e-6 KL (Rombach et al. 2022 keep the KL weight as small).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from drawings import DATA
from pool import Pool
from training import Recipe, Stage


def new_vae() -> AutoencoderKL:
    """Return the untrained autoencoder; two halvings, so a latent cell is 4 x 4 pixels."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def to_model(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return uint8 (n, h, w, 3) as float32 (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: torch.Tensor) -> np.ndarray:
    """Return (n, 3, h, w) in [-1, 1] as uint8 (n, h, w, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the decibels of the round trip over pictures in [0, 1]."""
    x = to_model(images, vae.device)
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10(((x - y) / 2).pow(2).mean()))


def main() -> None:
    """Train, then set the scaling factor that gives latents unit deviation, and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pool = Pool.load(args.data / "pool.npz")
    vae = new_vae().to(args.device)
    recipe = Recipe(args.steps, args.batch, args.lr, seed=args.seed, ema=0.995)
    stage = Stage("vae", vae, recipe, args.data / "state")
    check = pool.images[:: max(1, len(pool) // 128)]

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        x = to_model(pool.images[rng.integers(len(pool), size=recipe.batch)], args.device)
        noise = torch.Generator(x.device).manual_seed(int(rng.integers(2**62)))
        with torch.autocast(x.device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(noise)).sample
        y = y.float()
        gradient = (torch.diff(y) - torch.diff(x)).abs().mean() + (
            torch.diff(y, dim=2) - torch.diff(x, dim=2)
        ).abs().mean()
        return (x - y).abs().mean() + gradient + 1e-6 * posterior.kl().float().mean()

    stage.run(loss_of, lambda: f"{psnr(vae, check):.1f} dB")
    with stage.averaged(), torch.no_grad():
        latents = torch.cat(
            [vae.encode(to_model(part, args.device)).latent_dist.mode() for part in np.array_split(check, 4)]
        )
        vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
        vae.to(torch.float16).save_pretrained(args.data / "vae", max_shard_size="12MB")
        vae.float()
    print(f"the autoencoder is in {args.data / 'vae'}")


if __name__ == "__main__":
    main()
