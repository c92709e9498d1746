"""Representations: taken out while drawing and from pictures, as sdhelper 1.0.0 takes them; what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from esd.analysis import Results, Subject, representations
from esd.analysis.representations import channel_levels, concat, generate, img2repr, similarity, site_of, spread
from esd.analysis.representations.extract import usual_positions
from esd.config.analyses import RepresentationsConfig
from esd.errors import UserError
from esd.interventions import Skip, attach
from tests.families import GUIDANCE, UNETS, every, make, shared
from tests.programs import Command, erased_weights, table


def positions(name: str) -> list[str]:
    return ["mid_block", "up_blocks[1]"] if name in UNETS else ["transformer_blocks[0]"]


def picture(seed: int = 0, size: int = 16) -> Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def sdhelper(pipe: Any, pixels: Tensor, places: list[Any], step: int, seed: int) -> list[Tensor]:
    """What sdhelper 1.0.0's `_img2repr` does for one picture, its lines in their order, with modules for paths.

    Left as it is: pictures go to the VAE in [0, 1]. SDXL is made to forget its pooled prompt; here for this call alone.
    """
    torch.manual_seed(seed)
    latents = pipe.vae.encode(pixels[None]).latent_dist.sample() * pipe.vae.config.scaling_factor
    noise = torch.randn_like(latents[None, 0]).expand(latents.shape)
    timestep = torch.tensor(step, dtype=torch.long)
    latents = DDIMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, timestep)
    prompt_embeds, *_ = pipe.encode_prompt(
        prompt=[""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    found: dict[int, Tensor] = {}

    def hook(module: Any, _: Any, output: Any) -> None:
        found[id(module)] = output[0] if isinstance(output, tuple) else output

    handles = [place.register_forward_hook(hook) for place in places]
    kind = pipe.unet.config.addition_embed_type
    pipe.unet.register_to_config(addition_embed_type="nothing_at_all")
    with torch.no_grad():
        pipe.unet(latents, timestep, encoder_hidden_states=prompt_embeds)
    pipe.unet.register_to_config(addition_embed_type=kind)
    for handle in handles:
        handle.remove()
    return [found[id(place)] for place in places]


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("step", [0, 100, 500])
def test_pictures_give_what_sdhelper_gives(name: str, step: int) -> None:
    """... at the range that its VAE gets, and, on SDXL, without the pooled prompt that it leaves out."""
    family = make(name)
    unet, pixels = family.denoiser, picture()
    places = [unet.conv_in, unet.down_blocks[1], unet.mid_block, unet.up_blocks[0], unet.up_blocks[1].resnets[0]]
    paths = ["conv_in", "down_blocks[1]", "mid_block", "up_blocks[0]", "up_blocks[1].resnets[0]"]
    without = [Skip("time.added")] if name.startswith("sdxl") else []
    expected = sdhelper(family.pipe, pixels, places, step, 7)
    with attach(family, *without):
        found = img2repr(family, (pixels + 1) / 2, paths, step, seeds=[7])
    for path, one in zip(paths, expected, strict=True):
        torch.testing.assert_close(found[path], one, atol=1e-4, rtol=1e-3)
    shifted = img2repr(family, (pixels + 1) / 2, paths, step + 1, seeds=[7])
    assert not torch.allclose(shifted["mid_block"], expected[2], atol=1e-4, rtol=1e-3)
    if without:  # with the conditioning that it was trained with, it is another one
        assert not torch.allclose(img2repr(family, (pixels + 1) / 2, paths, step, seeds=[7])["mid_block"], expected[2])


@pytest.mark.parametrize("name", ["sd1", "sdxl-turbo", "flux-dev", "sd3.5", "klein"])
def test_nothing_that_was_looked_at_is_changed_for_later_drawings(name: str) -> None:
    family = make(name)
    told = {"num_steps": 2, "guidance_scale": GUIDANCE[name], "seed": 3}
    before = generate(family, "a cat", **told).image
    config = dict(family.denoiser.config)
    img2repr(family, before, positions(name), 100)
    assert torch.equal(generate(family, "a cat", **told).image, before) and dict(family.denoiser.config) == config
    assert torch.equal(generate(family, "a cat", extract_positions=positions(name), **told).image, before)


def test_the_stock_turbo_pipeline_draws_the_same_afterwards() -> None:
    pipe = (family := make("sdxl-turbo")).pipe

    def drawn() -> np.ndarray:
        source = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=2, guidance_scale=0.0, generator=source, output_type="np").images

    before = drawn()
    img2repr(family, picture(), ["mid_block", "up_blocks[1]"], 100)
    assert np.array_equal(drawn(), before)


@every
def test_every_step_of_a_drawing_and_every_noise_of_a_picture_is_a_row(name: str) -> None:
    family = shared(name)
    drawn = generate(family, "a cat", extract_positions=positions(name), num_steps=3, guidance_scale=GUIDANCE[name])
    shown = img2repr(family, drawn.image, positions(name), 100, seeds=[0, 1, 2])
    for position in positions(name):
        steps, noises = drawn.representations[position], shown[position]
        assert len(steps) == len(drawn.t) == 3 and steps.shape == noises.shape and steps.ndim == 4
        assert steps.shape[2] == steps.shape[3] and steps.isfinite().all() and len(noises.unique(dim=0)) == 3
    alone = img2repr(family, drawn.image, positions(name), 100, seeds=[1])[positions(name)[0]][0]
    torch.testing.assert_close(alone, shown[positions(name)[0]][1], atol=1e-4, rtol=1e-3)


def test_the_last_step_of_a_drawing_is_what_the_denoiser_makes_there() -> None:
    """Shown the very x_t of the last step, with the prompt, the representation is the same."""
    family = shared("sd1")
    drawn = generate(family, "a cat", extract_positions=["mid_block", "mid"], num_steps=3, guidance_scale=3.0)
    assert torch.equal(drawn.representations["mid_block"], drawn.representations["mid"])
    kept: list[Tensor] = []
    handle = family.denoiser.mid_block.register_forward_hook(lambda _, __, output: kept.append(output))
    family.pipe("a cat", num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
    handle.remove()
    assert len(kept) == 4  # PNDM evaluates the second time twice
    torch.testing.assert_close(drawn.representations["mid_block"][0], kept[0][1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(drawn.representations["mid_block"][-1], kept[-1][1], atol=1e-4, rtol=1e-3)


@every
def test_pictures_come_back_from_latents(name: str) -> None:
    """The latents of the denoiser are scaled and packed as the VAE's decoder expects them."""
    family = shared(name)
    latents = torch.randn(family.sample_shape, generator=torch.Generator().manual_seed(0))[None]
    torch.testing.assert_close(family._from_vae(family._vae_latents(latents)), latents, atol=1e-4, rtol=1e-4)
    image = picture(size=family.sample_shape[1] * family.pixels_per_latent)[None]
    found = family.encode_images(image)
    assert found.shape == (1, *family.sample_shape)
    sources = [torch.Generator().manual_seed(i) for i in range(2)]
    two = family.encode_images(image, sources)
    assert two.shape[0] == 2 and not torch.equal(two[0], two[1])
    with pytest.raises(UserError, match="17 pixels: allowed: edges that are multiples of"):
        family.encode_images(torch.zeros(1, 3, 17, 17))


def test_grids_of_several_sizes_become_one_and_likeness_is_a_cosine() -> None:
    small = torch.arange(8.0).reshape(1, 2, 2, 2)
    large = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = concat({"a": small, "b": large})
    assert found.shape == (1, 5, 4, 4) and torch.equal(found[:, 2:], large)
    assert torch.equal(found[:, :2], small.repeat_interleave(2, -2).repeat_interleave(2, -1))
    assert torch.equal(concat({"a": small, "b": large}, ["b"]), large)
    likeness = similarity(found[0], found[0])
    assert likeness.shape == (4, 4, 4, 4) and likeness.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(likeness[1, 2, 1, 2], torch.tensor(1.0))
    expected = torch.nn.functional.cosine_similarity(found[0, :, 0, 1], found[0, :, 3, 2], dim=0)
    torch.testing.assert_close(likeness[0, 1, 3, 2], expected)


def test_spread_and_levels_are_those_of_the_notebook() -> None:
    x = torch.randn(100, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 5)[:, None, None]
    assert spread(x).shape == (2, 2)
    torch.testing.assert_close(spread(x).mean(), x.std(dim=0).mean())
    assert channel_levels(x).tolist() == sorted(x.abs().mean(dim=(0, 2, 3)).tolist(), reverse=True)


@pytest.mark.parametrize(
    ("position", "told"),
    [
        ("mid_blok", "modules of this model: .*mid_block"),
        ("up_blocks[9]", r"up_blocks\[0..1\]"),
        ("__import__('os')", "position"),
        ("time_embedding", "has no places in the picture"),
    ],
)
def test_a_position_that_is_none_is_refused_and_nothing_is_evaluated(position: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        img2repr(shared("sd1"), picture(), [position], 100)


def test_a_time_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="allowed: training times from 0 to 999"):
        img2repr(shared("sd1"), picture(), ["mid_block"], 1000)


def test_positions_are_modules_or_selections() -> None:
    family = shared("sd2-v")
    assert site_of(family, "up_blocks[1]") == site_of(family, "up[1]")
    assert site_of(family, "up_blocks[1].attentions[0]").path == "up_blocks.1.attentions.0"
    assert site_of(family, "down_blocks[0]").path == "down_blocks.0.downsamplers.0"
    assert site_of(shared("flux-dev"), "single_transformer_blocks[1]").label == "single.1"


@every
def test_every_model_has_positions_to_begin_with(name: str) -> None:
    found = usual_positions(shared(name))
    assert len(found) == 2 and (found == ["mid_block", "up_blocks[1]"]) == (name in UNETS)
    shown = img2repr(shared(name), picture(), found, 100)
    assert all(shown[position].ndim == 4 for position in found)


FEW = {"noises": 3, "channel_steps": [0, 200], "histogram_step": 100, "map_step": 50, "spread_steps": [0, 250]}


@pytest.mark.parametrize("name", ["sd1", "sdxl-turbo", "flux-schnell", "sd3"])
def test_the_analysis_leaves_figures_tables_and_captions(name: str, tmp_path: Path) -> None:
    subject = Subject(shared(name), num_steps=2, guidance_scale=GUIDANCE[name])
    results = Results(tmp_path)
    settings = vars(RepresentationsConfig(prompts=["a cat", "a dog"], positions=positions(name), **FEW))
    representations.analyse(subject, results, **settings)
    names = {"levels", "channels", "histogram", "maps", "over_time", "similarity"}
    assert set(results.captions) == {path.stem for path in tmp_path.glob("*.png")} == names
    rows = table(tmp_path / "over_time.csv")
    assert len(rows) == 2 * 2 * len(positions(name)) and all(float(row["std"]) > 0 for row in rows)
    image = results.kept("pictures", lambda: np.zeros(0))[1]
    expected = spread(img2repr(subject.family, image, positions(name), 250, seeds=range(3))[positions(name)[0]]).mean()
    (row,) = (r for r in rows if (r["picture"], r["t"], r["position"]) == ("1", "250", positions(name)[0]))
    assert float(row["std"]) == pytest.approx(float(expected), rel=1e-3)
    late = [float(r["std"]) for r in rows if (r["t"], r["position"]) == ("250", positions(name)[0])]
    assert f"{np.mean(late):.3g} at t = 250" in results.captions["over_time"]


def test_the_program_measures_base_and_erased(command: Command) -> None:
    erased_weights(command.folder / "weights/erased.safetensors")
    settings = [f"representations.{key}={value}" for key, value in FEW.items()]
    fast = ("analysis=representations", "model.path=base", "num_steps=2", "device=cpu", "run_dir=out", *settings)
    ended = command("analyze", *fast, "checkpoint=weights", "representations.prompts=[a cat]")
    assert ended.code == 0, ended.err
    assert {row["model"] for row in table(command.folder / "out/levels.csv")} == {"base", "erased"}
    ended = command("analyze", *fast[:4], "run_dir=nowhere", "representations.positions=[mid_blok]")
    assert ended.code == 2 and "position 'mid_blok'" in ended.err and len(ended.err.splitlines()) == 1
