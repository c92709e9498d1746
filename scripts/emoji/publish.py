"""Assemble the trained parts into what the project ships: `emoji-sd`, `emoji-clip`, `emoji-judge`.

    python scripts/emoji/publish.py             # data/emoji/ -> checkpoints/

All three or none. Their cards are written by hand and stay: a folder of `checkpoints/` without README.md is refused.
Parts that were not trained on each other are refused. How each was trained goes into `emoji-sd/training.json`.

UNet and autoencoder are written in float16 and the text tower in float32: when no dtype is asked for, stock diffusers
loads the first two into float32 while transformers keeps what it finds, and a pipeline of mixed dtypes fails at its
first step.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from catalogue import HYPERNYMS, PHRASINGS, STYLES, THINGS
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from drawings import DATA
from files import Refused, arguments, folder_digest, made_by, need, whole_folders
from pages import held_out_pairs
from train_clip import save_tokenizer, tower
from train_unet import new_scheduler
from training import HISTORY, Runs
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

SHARD = "12MB"
MAX_BYTES = 35_000_000
MODELS = ("emoji-sd", "emoji-clip", "emoji-judge")
MAKERS = {
    "tokenizer": "train_clip.py",
    "vae": "train_vae.py",
    "judge": "train_judge.py",
    "unet": "train_unet.py",
    "text": "train_unet.py",
    "clip": "train_clip.py",
}
"""What is published -> the stage that makes it."""
PIXELS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 64, "width": 64},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
"""How CLIP takes pictures, in transformers' words: `train_vae.to_model` of 64 pixels."""
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


def histories(data: Path) -> Runs:
    """Return the runs of every stage, as told beside the parts; the UNet's tell the CLIP that its text tower was."""
    told: Runs = {}
    for part in ("clip", "vae", "judge", "unet"):
        told |= json.loads(made_by(MAKERS[part], data / part / HISTORY).read_text())
    return told


def refuse_unfit(data: Path, target: Path) -> None:
    """Refuse what is not complete or has no card, a CLIP that reads words otherwise than the UNet, and parts of others.

    A part is of others if its last run was on another autoencoder, tokenizer or text tower than is there.
    """
    for part, maker in MAKERS.items():
        made_by(maker, data / part)
    for name in MODELS:
        if not (card := target / name / "README.md").exists():
            raise Refused(f"{card} is missing; a model is not published without a card: write or restore it")
    clip, text = (tower(part) for part in towers(data))
    if clip.keys() != text.keys() or any(not torch.equal(clip[name], value) for name, value in text.items()):
        raise Refused(
            f"the text tower of {data / 'clip'} is not {data / 'text'}; run train_clip.py --text {data / 'text'}"
        )
    there = {part: folder_digest(data / part) for part in MAKERS}
    last = {stage: runs[-1]["made_from"] for stage, runs in histories(data).items() if runs}
    for stage, part in [(stage, part) for stage, seen in last.items() for part in seen if part in there]:
        if last[stage][part] != there[part]:
            raise Refused(
                f"{stage} was trained on another {part} than {data / part}; train it on this one (--changed and more "
                "--steps) or restore that one"
            )


def towers(data: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return CLIP's text tower and the UNet's."""
    return CLIPModel.from_pretrained(data / "clip").text_model, CLIPTextModel.from_pretrained(data / "text")


def publish(data: Path, target: Path) -> None:
    """Write the three folders, all or none, keeping their cards."""
    need(target, 2 * MAX_BYTES)
    with whole_folders(target / "part.publish", target) as new:
        refuse_unfit(data, target)
        write(data, new)
        for name in MODELS:
            shutil.copy(target / name / "README.md", new / name)
        size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
        if size > MAX_BYTES:
            raise Refused(f"the three models take {size:,} bytes, {MAX_BYTES:,} are allowed; make one smaller")
    print(f"{size / 1e6:.1f} MB are in {target}")


def write(data: Path, new: Path) -> None:
    """Write the three models without their cards."""
    tokenizer = CLIPTokenizer.from_pretrained(data / "tokenizer")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(data / "vae").half(),
        text_encoder=CLIPTextModel.from_pretrained(data / "text").float(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(data / "unet").half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(new / "emoji-sd", max_shard_size=SHARD)
    CLIPModel.from_pretrained(data / "clip").half().save_pretrained(new / "emoji-clip", max_shard_size=SHARD)
    for folder in (new / "emoji-sd" / "tokenizer", new / "emoji-clip"):
        save_tokenizer(tokenizer, folder)
    shutil.copytree(data / "judge", new / "emoji-judge", ignore=shutil.ignore_patterns(HISTORY))
    for file, told in (
        ("emoji-sd/vocabulary.json", vocabulary()),
        ("emoji-sd/training.json", histories(data)),
        ("emoji-clip/preprocessor_config.json", PIXELS),
    ):
        (new / file).write_text(json.dumps(told, indent=1) + "\n")
    for config in new.rglob("config.json"):  # diffusers notes where each part was loaded from
        told = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(told, indent=2) + "\n")


def main() -> None:
    """Publish what a data folder holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=CHECKPOINTS)
    args = arguments(parser)
    publish(args.data, args.out)


if __name__ == "__main__":
    main()
