"""The autoencoder: 64 x 64 x 3 pictures to 16 x 16 x 4 latents, trained on the pool.

    python scripts/emoji/train_vae.py           # -> data/emoji/vae/
    python scripts/emoji/train_vae.py --start checkpoints/emoji-sd   # from published weights

Loss: L1 + L1 of the image gradients + 1e-6 KL (Rombach et al. 2022 keep the KL weight as small).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from files import whole_folders
from training import Origin, Recipe, Stage, adopt, begin, command_line, tell


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


def loss_of_round_trip(vae: AutoencoderKL, x: torch.Tensor, seed: int) -> torch.Tensor:
    """Return how far pictures (b, 3, h, w) come back from where they were, and how far the latents are from noise."""
    noise = torch.Generator(x.device).manual_seed(seed)
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(noise)).sample
    y = y.float()
    across = (torch.diff(y) - torch.diff(x)).abs().mean()
    down = (torch.diff(y, dim=2) - torch.diff(x, dim=2)).abs().mean()
    return (x - y).abs().mean() + (across + down) + 1e-6 * posterior.kl().float().mean()


@torch.no_grad()
def scale_of(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the factor that scales these pictures' latents to deviation 1."""
    parts = [vae.encode(to_model(part, vae.device)).latent_dist.mode() for part in np.array_split(images, 4)]
    return round(float(1 / torch.cat(parts).std()), 4)


def publish(vae: AutoencoderKL, stage: Stage, data: Path) -> None:
    """Write the autoencoder in half precision."""
    with whole_folders(data / "part.vae", data) as new:
        vae.to(torch.float16).save_pretrained(new / "vae", max_shard_size="12MB")
        tell(new / "vae", stage.runs)
    vae.float()


def main() -> None:
    """Train, then publish the averaged weights."""
    args, pool = begin(command_line(__doc__, steps=2800, batch=16, lr=1e-3, seed=0))
    adopt(args, "vae", ("vae",))
    vae = AutoencoderKL.from_pretrained(args.start, subfolder="vae").float() if args.start else new_vae()
    vae.to(args.device)
    recipe = Recipe(args.steps, args.batch, args.lr, seed=args.seed, ema=0.995)
    stage = Stage("vae", vae, recipe, args.data, Origin.of(args, recipe, pool=pool.digest()))
    if stage.made(args.data / "vae"):  # and a denoiser may already have learned latents of its scale
        return
    check = pool.images[:: max(1, len(pool) // 128)]

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        x = to_model(pool.images[rng.integers(len(pool), size=recipe.batch)], args.device)
        return loss_of_round_trip(vae, x, seed=int(rng.integers(2**62)))

    stage.run(loss_of, lambda: f"{psnr(vae, check):.1f} dB on training pictures")
    with stage.averaged():
        vae.register_to_config(scaling_factor=scale_of(vae, check))
        publish(vae, stage, args.data)
    print(f"the autoencoder is in {args.data / 'vae'}")


if __name__ == "__main__":
    main()
