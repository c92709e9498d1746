"""Images: one generator each, written once, base and erased side by side."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esd import checkpoint
from esd.errors import UserError
from esd.evaluation.generate import Manifest, Share, base_of, generate, plan, sample
from esd.evaluation.identity import weights_hash
from esd.evaluation.pixels import images_of
from esd.evaluation.preview import Row, draw
from esd.evaluation.prompts import PromptRow
from esd.families import family_of, load_pipeline
from tests import tiny
from tests.programs import DRAW, Command, erased_weights

SETTINGS = {"num_steps": 2, "guidance_scale": 3.0}
BASE = {"name": "tiny/sd", "revision": None, "fingerprint": "ab"}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_image_does_not_depend_on_its_batch(batch_size: int) -> None:
    pipe, prompts, seeds = tiny.pipeline(), ["a cat", "a dog", "a rose"], [3, 1, 2]
    together = sample(pipe, prompts, seeds, batch_size=3, **SETTINGS)
    apart = sample(pipe, prompts[::-1], seeds[::-1], batch_size=batch_size, **SETTINGS)[::-1]
    assert together.shape == (3, 16, 16, 3) and together.dtype == np.uint8
    assert np.abs(together.astype(int) - apart).max() <= 1  # rounding to 8 bits


def test_latents_are_decoded_alike_in_any_batches_and_those_without_a_picture_are_refused() -> None:
    family = family_of(tiny.pipeline())
    latents = family.initial_noise([torch.Generator().manual_seed(seed) for seed in range(3)])
    images = images_of(family, latents)
    assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8
    assert np.abs(images.astype(int) - images_of(family, latents, batch_size=2)).max() <= 1
    with pytest.raises(UserError, match="not finite"):
        images_of(family, torch.cat([latents, latents[:1] * torch.nan]), batch_size=2)


def test_files_are_named_by_case_and_sample_and_existing_ones_are_kept(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    rows = [PromptRow(7, "a cat", 1, labels={"thing": "cat"}), PromptRow(9, "a dog", 5, guidance=1.0)]
    planned = plan(rows, tmp_path, base=BASE, images_per_prompt=2, **SETTINGS)
    told = generate(pipe, planned, batch_size=2)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "7_0.png",
        "7_1.png",
        "9_0.png",
        "9_1.png",
    ]
    assert [(image.seed, image.guidance) for image in told.images] == [(1, 3.0), (2, 3.0), (5, 1.0), (6, 1.0)]
    assert Manifest.load(tmp_path) == told
    kept = (tmp_path / "7_0.png").stat().st_mtime_ns
    (tmp_path / "9_1.png").unlink()
    again = plan(rows, tmp_path, base=BASE, images_per_prompt=2, **SETTINGS)
    assert generate(pipe, again, batch_size=2) == told
    assert (tmp_path / "7_0.png").stat().st_mtime_ns == kept and (tmp_path / "9_1.png").exists()
    alone = sample(pipe, ["a dog"], [6], num_steps=2, guidance_scale=1.0, batch_size=1)[0]
    assert np.abs(np.asarray(Image.open(tmp_path / "9_1.png")).astype(int) - alone).max() <= 1


ROWS = [
    PromptRow(0, "a cat", 3),
    PromptRow(1, "a dog", 1, guidance=1.0),
    PromptRow(2, "a rose", 2, height=8, width=24),
    PromptRow(3, "a photo of a cat", 9),
    PromptRow(4, "a dog", 4, guidance=1.0),
]


def pictures(folder: Path, rows: list[PromptRow] = ROWS) -> list[np.ndarray]:
    return [np.asarray(Image.open(folder / f"{row.case_number}_0.png")).astype(int) for row in rows]


def test_rows_of_other_guidance_and_size_are_drawn_as_they_say_and_as_they_would_be_alone(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    generate(pipe, plan(ROWS, tmp_path, base=BASE, **SETTINGS), batch_size=3)
    assert [picture.shape for picture in pictures(tmp_path)] == [(16, 16, 3)] * 2 + [(8, 24, 3)] + [(16, 16, 3)] * 2
    for row, picture in zip(ROWS, pictures(tmp_path), strict=True):
        alone = sample(
            pipe, [row.prompt], [row.evaluation_seed], num_steps=2, guidance_scale=row.guidance or 3.0, batch_size=1,
            height=row.height, width=row.width,
        )[0]  # fmt: skip
        assert np.abs(picture - alone).max() <= 1


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shares_draw_what_one_process_would_and_nothing_twice(tmp_path: Path, count: int) -> None:
    pipe = tiny.pipeline()
    generate(pipe, plan(ROWS, tmp_path / "one", base=BASE, **SETTINGS), batch_size=3)
    drawn: list[set[str]] = []
    for index in range(count):
        before = {path.name for path in (tmp_path / "many").glob("*.png")}
        generate(pipe, plan(ROWS, tmp_path / "many", base=BASE, **SETTINGS), batch_size=2, share=Share(index, count))
        drawn.append({path.name for path in (tmp_path / "many").glob("*.png")} - before)
    assert [len(names) for names in drawn] == [len(ROWS[index::count]) for index in range(count)]
    assert Manifest.load(tmp_path / "many").images == Manifest.load(tmp_path / "one").images
    for one, many in zip(pictures(tmp_path / "one"), pictures(tmp_path / "many"), strict=True):
        assert np.abs(one - many).max() <= 1


def test_kept_images_of_the_base_are_found_by_what_they_are(tmp_path: Path) -> None:
    pipe, kept = tiny.pipeline(), tmp_path / "kept"

    def drawn(name: str, rows: list[PromptRow], steps: int = 2, **facts: object) -> list[np.ndarray]:
        told: dict = {"base": BASE, "num_steps": steps, "guidance_scale": 3.0} | facts
        generate(pipe, plan(rows, tmp_path / name, **told), batch_size=2, kept=kept)
        return pictures(tmp_path / name, rows)

    drawn("first", ROWS)
    assert len(list(kept.iterdir())) == len(ROWS)
    for file in kept.iterdir():  # what comes from there can be told from what is drawn
        with Image.open(file) as opened:
            Image.new("RGB", opened.size, "red").save(file)
    red = [255, 0, 0]
    others = [PromptRow(80 + row.case_number, row.prompt, row.evaluation_seed, row.guidance, {"class": "x"},
                        row.height, row.width) for row in ROWS]  # fmt: skip
    assert all((picture == red).all() for picture in drawn("again", others))
    unlike = [
        drawn("steps", ROWS[:1], steps=3),
        drawn("base", ROWS[:1], base=BASE | {"fingerprint": "cd"}),
        drawn("versions", ROWS[:1], drawn_with={"torch": "0"}),
        drawn("seed", [PromptRow(0, "a cat", 4)]),
        drawn("guidance", [PromptRow(0, "a cat", 3, guidance=2.0)]),
        drawn("size", [PromptRow(0, "a cat", 3, height=8)]),
        drawn("weights", ROWS[:1], checkpoint=erased_weights(tmp_path / "erased.safetensors")),
    ]
    assert not any((picture == red).all() for pictures in unlike for picture in pictures)
    assert len(list(kept.iterdir())) == len(ROWS) + len(unlike) - 1, "images of erased weights are not kept"


def test_a_damaged_kept_image_is_drawn_anew(tmp_path: Path) -> None:
    pipe, kept = tiny.pipeline(), tmp_path / "kept"
    for name in ("first", "second"):
        generate(pipe, plan(ROWS[:1], tmp_path / name, base=BASE, **SETTINGS), batch_size=2, kept=kept)
        (file,) = kept.iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    assert (tmp_path / "second/0_0.png").read_bytes() == (tmp_path / "first/0_0.png").read_bytes()


CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "unet": ("weights", lambda pipe: pipe.unet.conv_in.weight.data[3].add_(1.0)),
    "vae": ("weights", lambda pipe: pipe.vae.decoder.conv_in.weight.data.add_(1.0)),
    "a word": ("weights", lambda pipe: pipe.text_encoder.get_input_embeddings().weight.data[40].add_(0.1)),
    "a scale": ("settings", lambda pipe: pipe.vae.register_to_config(scaling_factor=4.0)),
    "a size": ("settings", lambda pipe: pipe.unet.register_to_config(sample_size=16)),
    "an activation": ("settings", lambda pipe: setattr(pipe.text_encoder.config, "hidden_act", "gelu")),
    "a pipeline": ("settings", lambda pipe: pipe.register_to_config(requires_safety_checker=True)),
    "merges": ("settings", lambda pipe: setattr(pipe, "tokenizer", rewritten(pipe.tokenizer, "merges"))),
    "spelling": ("settings", lambda pipe: setattr(pipe, "tokenizer", rewritten(pipe.tokenizer, "vocab"))),
    "length": ("settings", lambda pipe: setattr(pipe.tokenizer, "model_max_length", 5)),
    "scheduler": ("scheduler", lambda pipe: pipe.scheduler.register_to_config(beta_end=0.02)),
}


def rewritten(tokenizer: Any, what: str) -> Any:
    """The tokenizer with its last merge left out, or with the numbers of two words exchanged."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab, merges = told["vocab"], [tuple(pair) for pair in told["merges"]]
    if what == "merges":
        merges = merges[:-1]
    else:
        vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    return type(tokenizer)(vocab=vocab, merges=merges, model_max_length=tokenizer.model_max_length)


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_is_known_by_every_part_that_decides_an_image(change: str) -> None:
    fact, make = CHANGES[change]
    pipe = tiny.every("sd1")
    before = base_of(family_of(pipe))
    pipe.tokenizer(["a cat"], padding="max_length", truncation=True)
    assert base_of(family_of(pipe)) == before, "being used changes nothing"
    make(pipe)
    after = base_of(family_of(pipe))
    assert [name for name in before if before[name] != after[name] and name != "fingerprint"] == [fact]
    assert str(before["scheduler"]).startswith("PNDMScheduler ")


def test_a_base_is_the_same_wherever_it_lies_and_of_every_family(tiny_model_dir: Path, tiny_pipe: Any) -> None:
    saved, made = (base_of(family_of(pipe)) for pipe in (load_pipeline(str(tiny_model_dir)), tiny_pipe))
    assert saved["weights"] == made["weights"] and saved["settings"] == made["settings"]
    for name in tiny.PIPELINES:
        assert base_of(family_of(tiny.every(name))) == base_of(family_of(tiny.every(name)))


def test_one_row_among_many_is_seen_and_so_is_a_buffer() -> None:
    words, norm = torch.nn.Embedding(2000, 64), torch.nn.BatchNorm2d(2)
    seen = {weights_hash({"words": words, "norm": norm})}
    for row in (0, 777, 1999):
        words.weight.data[row] += 0.01
        seen.add(weights_hash({"words": words, "norm": norm}))
    norm.running_mean += 1
    seen.add(weights_hash({"words": words, "norm": norm}))
    assert len(seen) == 5 and weights_hash({"words": words.half(), "norm": norm}) not in seen


def test_images_of_a_base_that_was_changed_in_place_are_neither_served_nor_gone_on_with(tmp_path: Path) -> None:
    def drawn(name: str, pipe: Any) -> np.ndarray:
        planned = plan(ROWS[:1], tmp_path / name, base=base_of(family_of(pipe)), **SETTINGS)
        generate(pipe, planned, batch_size=1, kept=tmp_path / "kept")
        return pictures(tmp_path / name, ROWS[:1])[0]

    before = drawn("first", tiny.every("sd1"))
    changed = tiny.every("sd1")
    changed.vae.register_to_config(scaling_factor=4 * changed.vae.config.scaling_factor)
    assert np.abs(before - drawn("second", changed)).max() > 3
    with pytest.raises(UserError, match="the base's settings is"):
        drawn("first", changed)
    told = Manifest.load(tmp_path / "first")
    old = {name: value for name, value in told.base.items() if name not in ("weights", "settings")}
    replace(told, base=old).save()
    with pytest.raises(UserError, match=r"before manifests told the base's weights and settings.*another run_dir"):
        drawn("first", tiny.every("sd1"))


def test_the_manifest_says_what_drew_the_images_and_each_sitting_once(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    for torch_version, rows in (("1", ROWS[:1]), ("1", ROWS[:2]), ("2", ROWS[:2]), ("3", ROWS[:3])):
        told = plan(rows, tmp_path, base=BASE, drawn_with={"torch": torch_version}, **SETTINGS)
        assert generate(pipe, told, batch_size=2) == Manifest.load(tmp_path)
    assert Manifest.load(tmp_path).drawn_with == ({"torch": "1"}, {"torch": "3"}), "the one with 2 drew nothing"


def test_pictures_that_are_not_finite_are_a_mistake_not_black() -> None:
    pipe = tiny.pipeline()
    with torch.no_grad():
        pipe.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        sample(pipe, ["a cat"], [0], batch_size=1, **SETTINGS)


def test_images_of_another_base_are_refused_but_not_for_where_it_was(command: Command) -> None:
    shutil.copytree(command.folder / "base", command.folder / "base-mine")
    draw_cat = ("generate", "prompts=[a cat]", "run_dir=out", *DRAW, "model.path=base-mine")
    assert command(*draw_cat).code == 0
    manifest, made = command.folder / "out/base/manifest.json", (command.folder / "out/base/0_0.png").stat().st_mtime_ns
    known = str((command.folder / "base-mine").resolve())
    manifest.write_text(manifest.read_text().replace(known, "/another/machine/base-mine"))
    assert command(*draw_cat).code == 0
    assert (command.folder / "out/base/0_0.png").stat().st_mtime_ns == made
    told = json.loads((command.folder / "out/base/manifest.json").read_text())["base"]
    assert told["name"] == str((command.folder / "base-mine").resolve()) and told["revision"] is None
    shutil.copytree(command.folder / "other", command.folder / "base-mine", dirs_exist_ok=True)
    ended = command(*draw_cat, "images_per_prompt=1")
    assert ended.code == 2 and "holds other images (the base's fingerprint" in ended.err, ended.err


def test_images_of_other_prompts_steps_or_weights_are_refused(tmp_path: Path) -> None:
    for weights in ("a", "b"):
        (tmp_path / weights).write_text(weights)
    plan([PromptRow(7, "a cat", 1)], tmp_path, base=BASE, checkpoint=tmp_path / "a", **SETTINGS).save()
    for row, steps, weights, told in (
        (PromptRow(7, "a dog", 1), 2, "a", "7_0.png: prompt"),
        (PromptRow(7, "a cat", 2), 2, "a", "7_0.png: seed"),
        (PromptRow(7, "a cat", 1), 3, "a", "num_steps"),
        (PromptRow(7, "a cat", 1), 2, "b", "sha256"),
    ):
        with pytest.raises(UserError, match=told):
            plan([row], tmp_path, base=BASE, num_steps=steps, guidance_scale=3.0, checkpoint=tmp_path / weights)


def test_a_folder_without_images_has_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no manifest"):
        Manifest.load(tmp_path)


def test_a_picture_holds_every_row_and_column(tmp_path: Path) -> None:
    rows = [Row(name, "target", np.full((3, 2, 8, 8, 3), 200, np.uint8)) for name in ("cat", "x" * 500)]
    draw(tmp_path / "small.png", rows[:1], ["a", "b", "c"], title="erased: cat")
    draw(tmp_path / "large.png", rows, ["a", "b", "c" * 300], title="erased: cat 猫 🐱")
    small, large = Image.open(tmp_path / "small.png"), Image.open(tmp_path / "large.png")
    assert large.height > small.height + 100 and large.width < 2000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_base_and_erased_are_drawn_side_by_side(command: Command) -> None:
    erased_weights(command.folder / "weights/erased.safetensors")
    ended = command("generate", "checkpoint=weights", "prompts=[a cat, a dog]", "run_dir=out", *DRAW)
    assert ended.code == 0, ended.err
    left = {name.removeprefix("out/") for name in command.files() if name.startswith("out/")}
    assert left == {
        ".lock",
        "config.yaml",
        "contact_sheet.png",
        "base",
        "erased",
        *(f"{folder}/{name}" for folder in ("base", "erased") for name in ("0_0.png", "1_0.png", "manifest.json")),
    }
    images = [np.asarray(Image.open(command.folder / "out" / name / "0_0.png")) for name in ("base", "erased")]
    assert np.abs(images[0].astype(int) - images[1]).max() > 3
    assert json.loads((command.folder / "out/erased/manifest.json").read_text())["checkpoint"] == str(
        Path("weights/erased.safetensors")
    )


def test_prompts_come_from_a_file_and_the_base_may_be_drawn_alone(command: Command) -> None:
    (command.folder / "p.csv").write_text("case_number,prompt,evaluation_seed\n4,a cat,11\n")
    ended = command("generate", "prompts=p.csv", "run_dir=out", "images_per_prompt=2", *DRAW)
    assert ended.code == 0, ended.err
    assert {"out/base/4_0.png", "out/base/4_1.png", "out/contact_sheet.png"} <= command.files()
    assert "out/erased" not in command.files()


def test_templates_run_over_what_the_model_knows(command: Command) -> None:
    asked = ("generate", "prompts=['a {thing}, {style} style']", *DRAW)
    ended = command(*asked)
    assert ended.code == 2 and "ships no vocabulary.json" in ended.err
    shutil.copytree(command.folder / "base", command.folder / "base-mine")
    words = {
        "things": [{"name": "cat"}, {"name": "dog"}],
        "styles": [{"name": "mosaic"}],
        "phrasings": {"held_out": {"both": ["{thing} {style}"], "thing": ["{thing}"], "style": ["{style}"]}},
    }
    (command.folder / "base-mine/vocabulary.json").write_text(json.dumps(words))
    ended = command(*asked, "model.path=base-mine", "run_dir=out")
    assert ended.code == 0, ended.err
    told = Manifest.load(command.folder / "out/base").images
    assert [(image.prompt, image.labels) for image in told] == [
        ("a cat, mosaic style", {"thing": "cat", "style": "mosaic"}),
        ("a dog, mosaic style", {"thing": "dog", "style": "mosaic"}),
    ]


def test_what_the_text_encoder_does_not_read_is_told(command: Command) -> None:
    long = "a cat in the style of a dog in the style of a rose"
    ended = command("generate", f"prompts=[a cat,{long}]", "run_dir=out", *DRAW)
    assert ended.code == 0 and "does not read" in ended.err and ended.err.count("warning") == 1
    assert list(Manifest.load(command.folder / "out/base").cut) == [long]


@pytest.mark.parametrize("width", [17, 18])  # no latents, and none that the stock pipeline takes
def test_a_size_that_the_model_cannot_draw_is_refused(command: Command, width: int) -> None:
    (command.folder / "p.csv").write_text(f"case_number,prompt,width\n4,a cat,16\n5,a dog,{width}\n")
    ended = command("generate", "prompts=p.csv", "run_dir=out", *DRAW)
    assert ended.code == 2 and f"case_number 5: width={width}: allowed: multiples of" in ended.err, ended.err


@pytest.mark.slow(reason="starts a launcher and two Pythons of its own, which import torch")
def test_two_processes_draw_what_one_would_into_one_folder(command: Command) -> None:
    erased_weights(command.folder / "weights/erased.safetensors")
    asked = ("checkpoint=weights", "prompts=[a cat, a dog, a rose]", *DRAW)
    assert command("generate", *asked, "run_dir=one").code == 0
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "esd.generate")
    ended = subprocess.run(
        [sys.executable, "-m", *launch, *asked, "run_dir=two"],
        capture_output=True, text=True, check=False, cwd=command.folder, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "shared out among 2 processes" in ended.stdout and ended.stdout.count("results are in two") == 1
    for name in ("base", "erased"):
        folders = [command.folder / run / name for run in ("one", "two")]
        one, two = ([np.asarray(Image.open(folder / f"{i}_0.png")).astype(int) for i in range(3)] for folder in folders)
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(one, two, strict=True))
        assert Manifest.load(folders[0]).images == Manifest.load(folders[1]).images


def test_interventions_change_base_and_erased_and_are_remembered(command: Command) -> None:
    erased_weights(command.folder / "erased.safetensors")
    drawn = ("prompts=[a cat]", "model.path=base", "num_steps=2", "checkpoint=erased.safetensors", "device=cpu")
    under = 'interventions=["Skip(up.cross, steps=(0, 1))", "Scale(mid.ff, activation=0.5, on=cond)"]'
    plain, changed = command("generate", *drawn, "run_dir=plain"), command("generate", *drawn, under, "run_dir=changed")
    assert plain.code == changed.code == 0, changed.err
    assert "under Skip(up.cross, steps=(0, 1)), Scale" in changed.out and "2 sites: up.1" in changed.out
    for model in ("base", "erased"):
        one, other = (
            pictures(command.folder / run / model, [PromptRow(0, "a cat", 0)]) for run in ("plain", "changed")
        )
        assert not np.array_equal(one[0], other[0])
    again = command("generate", *drawn, "run_dir=changed")
    assert again.code == 2 and "interventions" in again.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Skip", "allowed: Skip, Scale"),
        ("Patch(mid)", "use esd.interventions.sample in Python"),
        ("Skip(mid, step=(0, 1))", "sets 'step'; allowed: steps, on"),
        ("Skip(mid, rows=(9,))", "sets rows, which are of one batch"),
        ("Skip(mid, steps=hello)", "steps='hello': allowed: numbers such as"),
        ("Skip(cross, steps=(30, 40))", "steps=(30, 40) reaches beyond the 2 steps"),
        ("Skip(cross, steps=(0.0, 0.1))", "holds none of the 2 steps"),
        ("Scale(mid, activation=nan)", "Scale(activation='nan'): allowed: a finite number"),
        ("Scale(mid, activation=hello)", "Scale(activation='hello'): allowed: a finite number"),
        ("Scale(mid, activation=1e999)", "Scale(activation=inf): allowed: a finite number"),
        ("Skip(mid, steps=import os)", "is no value"),
        ("Skip(mid, steps=(3, 1))", "allowed: numbers such as"),
        ("Skip(nowhere)", "matched nothing"),
        ("Scale(mid)", "changes nothing"),
    ],
)
def test_an_intervention_that_cannot_be_read_is_refused(command: Command, text: str, message: str) -> None:
    drawn = ("prompts=[a cat]", "model.path=base", "num_steps=2", "device=cpu", "run_dir=out")
    told = command("generate", *drawn, f'interventions=["{text}"]')
    assert told.code == 2 and message in told.err and len(told.err.splitlines()) == 1, told.err
    assert not (command.folder / "out").exists()


def test_an_intervention_on_a_null_prompt_that_some_image_lacks_is_refused(command: Command) -> None:
    (command.folder / "p.csv").write_text("case_number,prompt,evaluation_guidance\n4,a cat,3\n5,a dog,1\n")
    drawn = ("prompts=p.csv", "model.path=base", "num_steps=2", "device=cpu", "run_dir=out")
    told = command("generate", *drawn, 'interventions=["Skip(mid, on=uncond)"]')
    assert told.code == 2 and "the null prompt is not evaluated" in told.err, told.err
    assert not (command.folder / "out").exists()


def test_a_plan_draws_nothing(command: Command) -> None:
    ended = command("generate", "prompts=[a cat]", "plan_only=true", *DRAW)
    assert ended.code == 0 and command.files() == set()


def test_files_inspects_and_exports(command: Command) -> None:
    file = erased_weights(command.folder / "weights/erased.safetensors")
    told = command("files", "inspect", str(file))
    assert told.code == 0 and '["cat"]' in told.out and "conv_in.weight" in told.out
    assert command("files", "export", "--format", "official", str(file), "--out", "official.safetensors").code == 0
    from safetensors.torch import load_file

    unet, weights = tiny.pipeline().unet, load_file(command.folder / "official.safetensors")
    base = {name: value.clone() for name, value in unet.state_dict().items()}
    assert unet.load_state_dict(weights, strict=False).unexpected_keys == []
    assert all(torch.allclose(unet.state_dict()[name], base[name] + 0.5) for name in weights)
    again = command("files", "export", "--format", "official", str(file), "--out", "official.safetensors")
    assert again.code == 2 and "exists" in again.err


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], ("tiny/sd", "c0ffee")),
        (["--model", "tiny/sd"], ("tiny/sd", "c0ffee")),
        (["--revision", "beef"], ("tiny/sd", "beef")),
        (["--model", "another/sd"], ("another/sd", None)),
        (["--model", "base"], ("base", None)),
    ],
    ids=str,
)
def test_an_export_adds_to_the_base_and_revision_that_the_checkpoint_names(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], asked: tuple[str, str | None]
) -> None:
    found = checkpoint.load(erased_weights(command.folder / "mine/erased.safetensors"))
    told = found.provenance | {"base": "tiny/sd", "revision": "c0ffee"}
    checkpoint.save(found.path, found.differences, told)
    loaded = []

    def load(path: str, revision: str | None, setting: str) -> object:
        loaded.append((path, revision))
        return tiny.pipeline()

    monkeypatch.setattr("esd.families.load_pipeline", load)
    ended = command("files", "export", "--format", "official", "mine", "--out", "official.safetensors", *arguments)
    assert ended.code == 0 and loaded == [asked], ended.err


def test_a_base_that_an_export_cannot_load_is_named_by_its_flag(command: Command) -> None:
    erased_weights(command.folder / "mine/erased.safetensors")
    shutil.copytree(command.folder / "base", command.folder / "hollow")
    (command.folder / "hollow/unet/diffusion_pytorch_model.safetensors").unlink()
    arguments = ("mine", "--out", "out.safetensors", "--model", "hollow")
    ended = command("files", "export", "--format", "official", *arguments)
    assert ended.code == 2 and "--model is 'hollow', which could not be loaded" in ended.err, ended.err


def test_mistakes_in_an_export_are_told_before_anything_is_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("esd.families.load_pipeline", loads)
    erased_weights(command.folder / "mine/erased.safetensors")
    export = ("files", "export", "--format", "official", "mine", "--out")
    for arguments, told in (
        (["nowhere/out.safetensors"], "there is no folder nowhere"),
        (["out.safetensors", "--model", "nowhere"], "--model is 'nowhere', which does not exist"),
        (["out.safetensors", "--revision", "beef"], "is a folder, which has no revisions"),
    ):
        ended = command(*export, *arguments)
        assert ended.code == 2 and told in ended.err
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write everywhere
    ended = command(*export, "out.safetensors")
    assert ended.code == 2 and "you may not write to the folder ." in ended.err
