"""A small CLIP on the drawings, and its tokenizer. Its text tower is the diffusion model's text encoder.

    python scripts/emoji/train_clip.py          # -> data/emoji/clip/, data/emoji/tokenizer/
    python scripts/emoji/train_clip.py --text data/emoji/text   # once the UNet is trained

The first run trains both towers; the text tower then goes on learning with the UNet. The second takes that text tower
as it is and trains the rest to agree with it (as LiT locks a tower, Zhai et al. 2022). `--start checkpoints/emoji-sd`
begins from the CLIP that is published beside that pipeline. A tokenizer that is there is kept: models know its words.

The loss is CLIP's (Radford et al. 2021, figure 3) with soft targets: in a batch of drawings of a hundred things many
captions ("a cat") fit several pictures, so each row's target is spread evenly over all that fit.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from catalogue import HYPERNYMS, PHRASINGS, STYLES, THINGS
from files import Refused, folder_digest, made_by, there, whole_folders
from pages import Caption, Page, describe
from pool import Pool
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from train_vae import to_model
from training import PUBLISHED, Origin, Recipe, Stage, adopt, begin, command_line, tell
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from esd.evaluation.prompts import say

STEPS = {"clip": 334, "clip-locked": 1500}
"""Stage -> its steps if none are asked for."""
MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""CLIP's splitting of text into words (openai/CLIP, simple_tokenizer.py)."""


def corpus() -> list[str]:
    """Return every word form a caption can hold, a few times over so that each becomes one token."""
    lines = [
        say(p, {"style": s, "thing": t.name, "first": t.name, "second": t.name})
        for split in PHRASINGS.values()
        for group in split.values()
        for p in group
        for t in THINGS
        for s in STYLES
    ]
    words = [word for t in THINGS for word in (*t.synonyms, *HYPERNYMS[t.group])]
    return lines + words * 50


def train_tokenizer(vocabulary: int = 1500) -> CLIPTokenizer:
    """Return a tokenizer of byte-level BPE merges learned on the captions."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learner.train_from_iterator(corpus(), trainer)
    merges = merges_of(learner)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    with tempfile.TemporaryDirectory() as folder:
        words = write_words(Path(folder), {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}, merges)
        special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
        return CLIPTokenizer(*map(str, words), model_max_length=MAX_TOKENS, **special)


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return the merges of a byte-level BPE tokenizer, in order."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def write_words(folder: Path, symbols: dict[str, int], merges: list[tuple[str, str]]) -> tuple[Path, Path]:
    """Write CLIPTokenizer's own two files, without which its slow form does not load; return where they are."""
    vocab, rules = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps(symbols))
    rules.write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return vocab, rules


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer for the fast and for the slow CLIPTokenizer."""
    tokenizer.save_pretrained(folder)
    symbols = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    write_words(folder, symbols, merges_of(tokenizer.backend_tokenizer))


def tokenizer_of(data: Path) -> CLIPTokenizer:
    """Return the tokenizer of a data folder; train and write one where there is none."""
    if not there(data / "tokenizer"):
        with whole_folders(data / "part.tokenizer", data) as new:
            save_tokenizer(train_tokenizer(), new / "tokenizer")
    folder_digest(data / "tokenizer")  # refuses what is left of one
    return CLIPTokenizer.from_pretrained(data / "tokenizer")


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return the untrained CLIP: text 128 wide, 4 layers; vision 128 wide, 5 layers, patches of 8 pixels."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": 128,
        **special,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "projection_dim": 128,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def fits(captions: list[Caption], pages: list[Page]) -> np.ndarray:
    """Return (captions, pictures) bool: whether caption i is true of picture j."""
    return np.array([[caption.fits(page) for page in pages] for caption in captions])


def tower(text: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a text tower's weights, under the same names whether it stands alone or in a CLIP."""
    return {name.removeprefix("text_model."): value for name, value in text.state_dict().items()}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids (n, 32), cut and padded."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids


def similarities(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str], images: np.ndarray) -> torch.Tensor:
    """Return the logits (captions, pictures) of which caption goes with which picture."""
    pixels = to_model(images, clip.device)
    ids = tokenize(tokenizer, captions).to(clip.device)
    with torch.autocast(pixels.device.type, torch.bfloat16):
        out = clip(input_ids=ids, pixel_values=pixels)
    return out.logits_per_text.float()


def contrast(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy over pictures and over captions, each target spread over all that is `true`."""
    to_images = -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    to_texts = -(true / true.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (to_images + to_texts) / 2


@torch.no_grad()
def zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, pool: Pool) -> str:
    """Return the accuracy over things and over styles on some of the pool, in phrasings kept from training."""
    singles = np.flatnonzero(pool.second < 0)[::31]
    held = PHRASINGS["held_out"]

    def best(captions: list[str]) -> np.ndarray:
        return similarities(clip, tokenizer, captions, pool.images[singles]).argmax(0).cpu().numpy()

    things = best([say(held["thing"][0], {"thing": t.name}) for t in THINGS]) == pool.first[singles]
    styles = best([say(held["style"][0], {"style": s}) for s in STYLES]) == pool.style[singles]
    return f"things {things.mean():.1%}, styles {styles.mean():.1%} of {len(singles)} training pictures"


def load(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return the CLIP to train: new or as it is published, with the text tower that is given, if one is."""
    clip = CLIPModel.from_pretrained(args.start / PUBLISHED["clip"]).float() if args.start else new_clip(tokenizer)
    if args.text:
        given = tower(CLIPTextModel.from_pretrained(made_by("train_unet.py", args.text)))
        clip.text_model.load_state_dict(given)
        clip.text_model.requires_grad_(False)
    return clip.to(args.device)


def publish(clip: CLIPModel, tokenizer: CLIPTokenizer, stage: Stage, data: Path) -> None:
    """Write CLIP with its tokenizer."""
    with whole_folders(data / "part.clip", data) as new:
        clip.save_pretrained(new / "clip", max_shard_size="12MB")
        save_tokenizer(tokenizer, new / "clip")
        tell(new / "clip", stage.runs)


def main() -> None:
    """Train tokenizer and CLIP and publish both."""
    parser = command_line(__doc__, steps=None, batch=192, lr=1e-3, seed=1)
    parser.add_argument("--text", type=Path, help="a trained text tower to keep as it is")
    args, pool = begin(parser)
    if args.batch > len(pool):
        raise Refused(f"--batch is {args.batch}, the pool has {len(pool)} pages; give no more than these")
    name = "clip-locked" if args.text else "clip"
    args.steps = STEPS[name] if args.steps is None else args.steps
    adopt(args, name, ("clip",), ("tokenizer",))
    tokenizer = tokenizer_of(args.data)
    clip = load(args, tokenizer)
    often = {"save_every": 150, "report_every": 150}
    recipe = Recipe(args.steps, args.batch, args.lr, weight_decay=0.1, ema=0.99, seed=args.seed, **often)
    made_from = {"pool": pool.digest(), "tokenizer": folder_digest(args.data / "tokenizer")}
    if args.text:
        made_from["text"] = folder_digest(args.text)
    stage = Stage(name, clip, recipe, args.data, Origin.of(args, recipe, **made_from))
    if stage.made(args.data / "clip"):
        return

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        indices = rng.choice(len(pool), recipe.batch, replace=False)
        pages = [pool.page(int(i)) for i in indices]
        kinds = [("both", "thing", "style")[int(k)] for k in rng.choice(3, len(pages), p=(0.7, 0.25, 0.05))]
        captions = [describe(page, rng, kind=kind) for page, kind in zip(pages, kinds, strict=True)]
        logits = similarities(clip, tokenizer, [caption.text for caption in captions], pool.images[indices])
        clip.logit_scale.data.clamp_(max=math.log(100.0))
        return contrast(logits, torch.from_numpy(fits(captions, pages)).to(logits))

    stage.run(loss_of, lambda: zero_shot(clip, tokenizer, pool))
    with stage.averaged():
        publish(clip, tokenizer, stage, args.data)
    print(f"CLIP is in {args.data / 'clip'}")


if __name__ == "__main__":
    main()
