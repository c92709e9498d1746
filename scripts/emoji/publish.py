"""Assemble the trained parts into what the project ships: `emoji-sd`, `emoji-clip`, `emoji-judge`.

    python scripts/emoji/publish.py             # data/emoji/ -> checkpoints/

UNet and autoencoder are written in float16 and the text tower in float32: when no dtype is asked for, stock diffusers
loads the first two into float32 while transformers keeps what it finds, and a pipeline of mixed dtypes fails at its
first step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from catalogue import HYPERNYMS, PHRASINGS, STYLES, THINGS
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from drawings import DATA
from pages import held_out_pairs
from train_unet import new_scheduler
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

SHARD = "12MB"
MAX_BYTES = 35_000_000
CHECKPOINTS = DATA.parents[1] / "checkpoints"


def vocabulary() -> dict[str, object]:
    """Return what the model knows, as `checkpoints/emoji-sd/vocabulary.json` holds it."""
    return {
        "judge": "../emoji-judge",
        "things": [
            {"name": t.name, "group": t.group, "synonyms": list(t.synonyms), "hypernyms": list(HYPERNYMS[t.group])}
            for t in THINGS
        ],
        "styles": [{"name": s} for s in STYLES],
        "phrasings": {
            split: {slot: list(phrases) for slot, phrases in slots.items()} for split, slots in PHRASINGS.items()
        },
        "held_out_pairs": [[THINGS[t].name, STYLES[s]] for t, s in sorted(held_out_pairs())],
    }


def publish(data: Path, target: Path) -> None:
    """Write the three folders, each beside its old self until it is whole."""
    text = CLIPTextModel.from_pretrained(data / "text", torch_dtype=torch.float32)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(data / "vae").half(),
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(data / "clip"),
        unet=UNet2DConditionModel.from_pretrained(data / "unet").half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    staged = target / ".staged"
    shutil.rmtree(staged, ignore_errors=True)
    pipe.save_pretrained(staged / "emoji-sd", max_shard_size=SHARD)
    (staged / "emoji-sd" / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=1) + "\n")
    CLIPModel.from_pretrained(data / "clip").half().save_pretrained(staged / "emoji-clip", max_shard_size=SHARD)
    CLIPTokenizer.from_pretrained(data / "clip").save_pretrained(staged / "emoji-clip")
    shutil.copytree(data / "judge", staged / "emoji-judge")
    for config in staged.rglob("config.json"):  # diffusers notes where each part was loaded from
        told = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(told, indent=2) + "\n")
    size = sum(file.stat().st_size for file in staged.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        sys.exit(f"publish: the three models take {size:,} bytes, {MAX_BYTES:,} are allowed; make one smaller")
    for folder in sorted(staged.iterdir()):
        final = target / folder.name
        card = final / "README.md"
        if card.exists():
            shutil.copy(card, folder / "README.md")
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    staged.rmdir()
    print(f"{size / 1e6:.1f} MB are in {target}")


def main() -> None:
    """Publish what a data folder holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=CHECKPOINTS)
    args = parser.parse_args()
    publish(args.data, args.out)


if __name__ == "__main__":
    main()
