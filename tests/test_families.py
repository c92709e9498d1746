from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from esd.config import train_sections
from esd.errors import UserError
from esd.families import Conditioning, Family, check_model, family_of, load_pipeline
from esd.families.diffusion import SCHEDULERS
from tests import tiny


def test_conditioning_is_a_batch() -> None:
    states = torch.arange(12.0).view(3, 2, 2)
    cond = Conditioning({"a": states, "ids": torch.arange(3)})
    assert len(cond) == 3
    assert torch.equal(cond[1].tensors["a"], states[1:2])
    assert torch.equal(cond[torch.tensor([2, 0])].tensors["a"], states[[2, 0]])
    assert torch.equal(cond[1:].tensors["ids"], torch.tensor([1, 2]))
    assert torch.equal(Conditioning.cat([cond, cond[0]]).tensors["a"], torch.cat([states, states[:1]]))
    half = cond.to(dtype=torch.bfloat16)
    assert half.tensors["a"].dtype == torch.bfloat16
    assert half.tensors["ids"].dtype == torch.int64


def test_encoding_is_the_stock_pipelines_and_does_not_depend_on_the_batch(tiny_family: Family) -> None:
    prompts = ["a cat", "", "a photo of the dog in mosaic style"]
    together = tiny_family.encode(prompts).tensors["encoder_hidden_states"]
    assert together.shape == (3, tiny.LENGTH, 16)
    stock = tiny_family.pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    torch.testing.assert_close(together, stock, atol=1e-5, rtol=1e-5)
    afresh = family_of(tiny_family.pipe)
    assert torch.equal(afresh.encode(prompts[2:]).tensors["encoder_hidden_states"], together[2:])


def test_encoding_carries_no_gradient(tiny_family: Family) -> None:
    assert not tiny_family.encode(["a rose"]).tensors["encoder_hidden_states"].requires_grad


def test_prediction_type_and_shape_come_from_the_model(any_family: Family) -> None:
    size = any_family.denoiser.config.sample_size
    assert any_family.sample_shape == (4, size, size)
    assert any_family.prediction_type == any_family.pipe.scheduler.config.prediction_type
    x, t = torch.randn(3, 4, size, size), torch.tensor([3, 500, 999])
    cond = any_family.encode(["a cat", "", "dog"])
    prediction = any_family.predict(any_family.denoiser, x, t, cond)
    assert prediction.shape == x.shape
    assert prediction.dtype == torch.float32
    one = any_family.predict(any_family.denoiser, x[1:2], t[1], cond[1])
    torch.testing.assert_close(prediction[1:2], one, atol=1e-5, rtol=1e-4)


def test_latents_are_as_large_as_the_pictures_asked_for(tiny_family: Family) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noise = tiny_family.initial_noise(generators, 20)
    assert noise.shape == (2, *tiny_family.latent_shape(20)) == (2, 4, 10, 10)
    assert tiny_family.decode(noise).shape == (2, 3, 20, 20)
    assert tiny_family.latent_shape() == tiny_family.latent_shape(16) == tiny_family.sample_shape


@pytest.mark.parametrize(("size", "near"), [(1, 2), (21, 20)])
def test_a_size_that_no_latents_have_is_refused(tiny_family: Family, size: int, near: int) -> None:
    with pytest.raises(UserError, match=f"trajectory.size={size}: allowed: multiples of 2 pixels, such as {near}"):
        tiny_family.latent_shape(size)


def test_initial_noise_is_that_of_the_stock_pipeline(tiny_family: Family) -> None:
    ours = tiny_family.initial_noise([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    stock = tiny_family.pipe.prepare_latents(
        2, 4, 16, 16, torch.float32, torch.device("cpu"), [torch.Generator().manual_seed(s) for s in (1, 2)]
    )  # 16 pixels: the tiny VAE halves
    assert torch.equal(ours, stock)


def test_the_settings_offer_the_schedulers_there_are() -> None:
    assert list(SCHEDULERS) == list(train_sections.SCHEDULERS)


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_every_scheduler_is_fresh_and_keeps_the_models_schedule(any_family: Family, name: str | None) -> None:
    first, second = any_family.scheduler(5, name), any_family.scheduler(7, name)
    assert first is not second
    assert len(second.timesteps) >= 7
    assert first.config.prediction_type == any_family.prediction_type
    assert first.config.beta_end == 0.012
    assert not first.config.get("clip_sample", False)


def test_model_input_is_scaled_for_euler(tiny_family: Family) -> None:
    x = torch.randn(2, 4, 8, 8)
    solver = tiny_family.scheduler(5, "euler")
    expected = x / (solver.sigmas[0] ** 2 + 1) ** 0.5
    torch.testing.assert_close(tiny_family.model_input(solver, x, solver.timesteps[0]), expected)
    assert torch.equal(tiny_family.model_input(tiny_family.scheduler(5, "ddim"), x, torch.tensor(801)), x)


@pytest.mark.parametrize(("name", "steps"), [("dimm", 5), ("ddim", 0), ("ddim", 1001), (None, -3)])
def test_scheduler_mistakes_name_the_value(tiny_family: Family, name: str | None, steps: int) -> None:
    with pytest.raises(UserError, match="dimm" if name == "dimm" else str(steps)):
        tiny_family.scheduler(steps, name)


def test_fewer_steps_than_a_scheduler_starts_with_are_refused() -> None:
    family = family_of(tiny.every("sdxl"))
    assert len(family.scheduler(4, "pndm").timesteps) > 4
    with pytest.raises(UserError, match="num_steps is 3: PNDMScheduler needs more"):
        family.scheduler(3, "pndm")


def test_alpha_and_sigma_are_the_schedulers(any_family: Family) -> None:
    table = any_family.pipe.scheduler.alphas_cumprod
    t = torch.tensor([0, 1, 500, 999])
    alpha, sigma = any_family.alpha_sigma(t)
    torch.testing.assert_close(alpha.square(), table[t])
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(4))
    between = any_family.alpha_sigma(torch.tensor([500.25]))[0].square()
    torch.testing.assert_close(between, 0.75 * table[500:501] + 0.25 * table[501:502])


def test_decoding_gives_the_stock_pipelines_images(tiny_family: Family) -> None:
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "latents": torch.randn(2, 4, 8, 8),
    }
    latents = tiny_family.pipe(["a cat", "dog"], output_type="latent", **call).images
    images = tiny_family.pipe(["a cat", "dog"], output_type="pt", **call).images
    ours = tiny_family.decode(latents)
    assert ours.shape == (2, 3, 16, 16)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, images)


def test_every_parameter_has_a_role(any_family: Family) -> None:
    infos = any_family.parameter_infos()
    named = dict(any_family.denoiser.named_parameters())
    assert [info.name for info in infos] == list(named)
    for info in infos:
        assert info.shape == tuple(named[info.name].shape)
        assert info.numel == named[info.name].numel()
        assert "other" not in (info.kind, info.stack, info.part), info
        assert info.part not in ("self", "cross", "ff", "proj") or info.projection, info
    blocks = {info.name: info.block for info in infos}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert blocks[name] == "down.0.attentions.0.block.0"
    assert blocks["up_blocks.1.resnets.0.conv1.weight"] == "up.1.resnets.0"
    assert blocks["mid_block.attentions.0.proj_in.weight"] == "mid.0.attentions.0"


def test_only_words_the_tokenizer_spells_out_are_unknown(tiny_family: Family) -> None:
    assert tiny_family.unknown_words(["a photo of the Cat, in mosaic style", "a zebra", "zebra dog"]) == ["zebra"]
    assert tiny_family.unknown_words([""]) == []


def test_symbols_the_tokenizer_never_saw_are_unknown_by_name(tiny_family: Family) -> None:
    astronaut = "👩\u200d🚀"
    assert tiny_family.unknown_words([f"a 🐱, the cat🐱! {astronaut} — dog"]) == ["🐱", astronaut, "—"]


def test_what_a_text_encoder_does_not_read_is_told(tiny_family: Family) -> None:
    fits, long = "a cat " * 5, "a cat " * 5 + "dog in mosaic style"
    assert tiny_family.cut([fits, "", long]) == {long: "dog in mosaic style"}
    encoded = [tiny_family.encode([prompt]).tensors["encoder_hidden_states"] for prompt in (fits, long)]
    assert torch.equal(*encoded)


def test_a_saved_pipeline_comes_back_without_a_safety_checker(tiny_model_dir: Path, tiny_pipe: Any) -> None:
    pipe = load_pipeline(tiny_model_dir)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert pipe.safety_checker is None
    for name, tensor in tiny_pipe.unet.state_dict().items():
        assert torch.equal(tensor, pipe.unet.state_dict()[name])
    family = family_of(pipe)
    assert (family.base_name, family.base_revision) == (str(tiny_model_dir.resolve()), None)
    assert family.unknown_words(["cat zebra"]) == ["zebra"]
    assert load_pipeline(tiny_model_dir, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_base_from_the_hub_is_known_by_its_name_and_commit(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, cached = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--tiny--sd"
    shutil.copytree(tiny_model_dir, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    family = family_of(load_pipeline("tiny/sd"))
    assert (family.base_name, family.base_revision) == ("tiny/sd", commit)
    with pytest.raises(UserError, match=r"'tiny/other'.*`hf auth login`, without a network set model\.path"):
        load_pipeline("tiny/other")


def test_a_base_made_in_memory_is_known_by_its_class(tiny_family: Family) -> None:
    assert (tiny_family.base_name, tiny_family.base_revision) == ("StableDiffusionPipeline", None)


def test_a_base_that_is_not_there_is_refused_without_network(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for wrong in ("nowhere", "checkpoints/none", "./none", str(tmp_path / "a/b"), "a/b/c", ""):
        with pytest.raises(UserError, match=r"model\.path is"):
            check_model(wrong)
    check_model("CompVis/stable-diffusion-v1-4")


def test_a_directory_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_index\.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=rf"model\.path is '{tmp_path}'.*names no pipeline.*get the whole model again"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "MusicPipeline"}')
    with pytest.raises(UserError, match=rf"'{tmp_path}'.* is a MusicPipeline; supported: StableDiffusionPipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{not json")
    with pytest.raises(UserError, match="could not be loaded"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("broken", ["unet", "text_encoder", "vae", "config"])
def test_a_model_that_did_not_arrive_whole_is_refused_with_what_to_do(
    tmp_path: Path, tiny_model_dir: Path, broken: str
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    if broken == "config":
        (tmp_path / "model/text_encoder/config.json").unlink()
    else:
        weights = next((tmp_path / "model" / broken).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(UserError, match=r"could not be loaded as a pipeline: .*; get the whole model again"):
        load_pipeline(tmp_path / "model")


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "unet", "vae", "scheduler"])
def test_a_directory_without_a_part_of_the_pipeline_is_refused_by_its_name(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", loads)
    shutil.copytree(tiny_model_dir, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost" / part)
    shutil.copytree(tiny_model_dir, tmp_path / "null")
    index = json.loads((tmp_path / "null/model_index.json").read_text())
    (tmp_path / "null/model_index.json").write_text(json.dumps(index | {part: [None, None]}))
    for folder in ("lost", "null"):
        with pytest.raises(UserError, match=f"{folder}', a StableDiffusionPipeline without its {part};"):
            load_pipeline(tmp_path / folder)


def test_unsupported_models_are_refused() -> None:
    with pytest.raises(UserError, match="supported: StableDiffusionPipeline"):
        family_of(object())
    pipe = tiny.pipeline()
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(UserError, match="'sample'"):
        family_of(pipe)
    pipe = tiny.pipeline()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UserError, match="9 channels"):
        family_of(pipe)


def test_prompts_encoded_once_stay_usable_wherever_the_encoders_are(monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(tiny.pipeline())
    before = family.encode(["a cat"])
    moves: list[str] = []
    monkeypatch.setattr(family.pipe.text_encoder, "to", lambda where: moves.append(str(where)))
    family.place("denoiser")
    assert torch.equal(
        before.tensors["encoder_hidden_states"], family.encode(["a cat"]).tensors["encoder_hidden_states"]
    )
    assert moves == ["cpu"]
