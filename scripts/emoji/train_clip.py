"""A small CLIP on the drawings, and its tokenizer. Its text tower is the diffusion model's text encoder.

    python scripts/emoji/train_clip.py          # -> data/emoji/clip/, data/emoji/tokenizer/
    python scripts/emoji/train_clip.py --text data/emoji/text   # once the UNet is trained

The first run trains both towers; the text tower then goes on learning with the UNet. The second takes that text tower
as it is and trains the rest to agree with it (as LiT locks a tower, Zhai et al. 2022).

The loss is CLIP's (Radford et al. 2021, figure 3) with soft targets: in a batch of drawings of a hundred things many
captions ("a cat") fit several pictures, so each row's target is spread evenly over all that fit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from catalogue import HYPERNYMS, PHRASINGS, STYLES, THINGS
from pages import Page, caption
from pool import Pool
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from train_vae import to_model
from training import DEVICE, Recipe, Stage, begin, command_line
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from esd.evaluation.prompts import say

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


def train_tokenizer(folder: Path, vocabulary: int = 1500) -> CLIPTokenizer:
    """Learn byte-level BPE merges on the captions and write them in CLIPTokenizer's two files."""
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
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


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


def fits(pages: list[Page], kinds: list[str]) -> np.ndarray:
    """Return (captions, pictures) bool: whether the caption of row i is true of picture j."""
    same_things = np.array([[a.things == b.things for b in pages] for a in pages])
    same_style = np.array([[a.style == b.style for b in pages] for a in pages])
    names_things = np.array([kind in ("both", "thing") for kind in kinds])[:, None]
    names_style = np.array([kind in ("both", "style") for kind in kinds])[:, None]
    return (same_things | ~names_things) & (same_style | ~names_style)


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
    return f"things {things.mean():.1%}, styles {styles.mean():.1%} of {len(singles)}"


def main() -> None:
    """Train tokenizer and CLIP and publish both."""
    parser = command_line(__doc__, steps=300, batch=192, lr=1e-3, seed=1)
    parser.add_argument("--text", type=Path, help="a trained text tower to keep as it is")
    parser.add_argument("--device", default=DEVICE)
    args, pool = begin(parser)
    tokenizer = train_tokenizer(args.data / "tokenizer")
    clip = new_clip(tokenizer).to(args.device)
    if args.text:
        clip.text_model.load_state_dict(CLIPTextModel.from_pretrained(args.text).state_dict())
        clip.text_model.requires_grad_(False)
    recipe = Recipe(args.steps, args.batch, args.lr, weight_decay=0.1, ema=0.99, seed=args.seed, save_every=150)
    stage = Stage("clip-locked" if args.text else "clip", clip, recipe, args.data / "state")

    def loss_of(rng: np.random.Generator) -> torch.Tensor:
        indices = rng.choice(len(pool), recipe.batch, replace=False)
        pages = [pool.page(int(i)) for i in indices]
        kinds = [("both", "thing", "style")[int(k)] for k in rng.choice(3, len(pages), p=(0.7, 0.25, 0.05))]
        captions = [caption(page, rng, kind=kind) for page, kind in zip(pages, kinds, strict=True)]
        logits = similarities(clip, tokenizer, captions, pool.images[indices])
        clip.logit_scale.data.clamp_(max=math.log(100.0))
        return contrast(logits, torch.from_numpy(fits(pages, kinds)).to(logits))

    stage.run(loss_of, lambda: zero_shot(clip, tokenizer, pool))
    with stage.averaged():
        clip.save_pretrained(args.data / "clip", max_shard_size="12MB")
        tokenizer.save_pretrained(args.data / "clip")
    print(f"CLIP is in {args.data / 'clip'}")


if __name__ == "__main__":
    main()
