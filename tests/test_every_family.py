"""What holds for every family: the stock pipeline judges how noise becomes a picture, and the base never moves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional

import esd
from esd import checkpoint, learner, seeding, trainer
from esd.description import describe
from esd.errors import UserError
from esd.families import Family, family_of, load_pipeline
from esd.objectives import Objective
from esd.selection import SelectionError
from esd.sources import Bank, Conditions, Sampling
from esd.trajectory import rollout
from esd.weights import WeightViews
from tests import tiny
from tests.families import GUIDANCE, MMDITS, TOLD, make, shared
from tests.plans import PLAN, SAMPLING

PROMPTS = ["a cat", "the dog in mosaic style"]
LONG = dataclasses.replace(  # every update sees the whole bank, so that one loss can be compared with another
    PLAN, sampling=SAMPLING, selection="esd_x", rollouts=2, reuse=60, updates=20, batch_size=6, lr=4e-3,
    objective=Objective(eta=2.0),
)  # fmt: skip

NAMES = (*tiny.PIPELINES, *tiny.OTHERS)
every = pytest.mark.parametrize("name", NAMES)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stock(family: Any, prompts: list[str], guidance: float, steps: int, **call: Any) -> Tensor:
    """Final latents of the stock pipeline, in the family's own form (b, c, h, w)."""
    pipe = family.pipe
    tokens = {"max_sequence_length": family.max_tokens} if hasattr(family, "max_tokens") else {}
    latents = pipe(
        prompt=prompts, guidance_scale=guidance, num_inference_steps=steps, generator=generators(*range(len(prompts))),
        output_type="latent", **tokens, **call, **TOLD.get(family.name, {}),
    ).images  # fmt: skip
    if family.name == "flux":
        latents = pipe._unpack_latents(latents, call["height"], call["width"], pipe.vae_scale_factor)
    if family.name == "flux2-klein":  # gives what its VAE decodes; we keep what the transformer makes
        latents, bn = functional.pixel_unshuffle(latents, 2), pipe.vae.bn
        std = (bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
        latents = (latents - bn.running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    return latents


def ours(family: Any, prompts: list[str], guidance: float, steps: int, height: int, width: int) -> Tensor:
    noise = generators(*range(len(prompts)))
    shape = (family.sample_shape[0], height // family.pixels_per_latent, width // family.pixels_per_latent)
    return rollout(
        family, family.denoiser, seeding.normal(noise, shape), family.encode(prompts), family.null(),
        num_steps=steps, guidance_scale=guidance, generators=noise,
    ).final  # fmt: skip


@every
@pytest.mark.parametrize("size", [(16, 16), (16, 24)], ids=str)
def test_our_sampler_draws_what_the_stock_pipeline_draws(name: str, size: tuple[int, int]) -> None:
    family, (height, width) = shared(name), size
    for guidance in {GUIDANCE[name], 3.0}:
        expected = stock(family, PROMPTS, guidance, 4, height=height, width=width)
        got = ours(family, PROMPTS, guidance, 4, height, width)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path, Any]:
    """(name, family, run directory, state of the denoiser before) of a short erasure."""
    AcceleratorState._reset_state(reset_partial_state=True)
    name = request.param
    family, folder = make(name), tmp_path_factory.mktemp(name)
    before = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    plan = dataclasses.replace(LONG, sampling=dataclasses.replace(SAMPLING, guidance_scale=GUIDANCE[name]))
    trainer.train(family, plan, folder, Accelerator(cpu=True))
    return name, family, folder, before


every_trained = pytest.mark.parametrize("trained", NAMES, indirect=True)


@every_trained
def test_an_erasure_lowers_the_loss_and_leaves_the_model_the_base(trained: Any) -> None:
    _, family, folder, before = trained
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(before[key], value) for key, value in family.denoiser.state_dict().items())
    assert set(checkpoint.load(folder).differences) == set(family.select("esd_x").names)


@every_trained
def test_the_stock_pipeline_with_erased_weights_draws_what_our_sampler_draws(trained: Any) -> None:
    name, family, folder, _ = trained
    base = ours(family, PROMPTS, GUIDANCE[name], 4, 16, 16)
    with esd.erased(family.pipe, folder):
        expected = stock(family, PROMPTS, GUIDANCE[name], 4, height=16, width=16)
        got = ours(family, PROMPTS, GUIDANCE[name], 4, 16, 16)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - base).abs().max() > 1e-2
    torch.testing.assert_close(ours(family, PROMPTS, GUIDANCE[name], 4, 16, 16), base)


@every
def test_an_attribute_is_pushed_off_the_concept_it_is_erased_from(name: str) -> None:
    """Points lie on the path of that concept, whose prediction the student starts from and is pushed off."""
    family, eta = shared(name), 2.0
    sampling = dataclasses.replace(SAMPLING, guidance_scale=GUIDANCE[name])
    alone = dataclasses.replace(LONG, prompts=("a cat",), sampling=sampling, objective=Objective(eta=eta))
    plan = dataclasses.replace(
        alone, prompts=("mosaic style",), erase_from=("a cat",), objective=Objective(anchor="erase_from", eta=eta)
    )
    erasing, other = (learner.point_sources(family, p, None, family.denoiser, 1)[0] for p in (plan, alone))
    points = erasing.points(0, range(6))
    assert torch.equal(points.x, other.points(0, range(6)).x)
    with torch.no_grad():
        loss = learner.loss_terms(family, plan.objective, family.denoiser, points, erasing, None, None)[0]
        concept, null = (
            family.predict(family.denoiser, points.x, points.t, cond[[0] * 6])
            for cond in (family.encode(["mosaic style"]), family.null())
        )
    torch.testing.assert_close(loss, eta**2 * (concept - null).square().mean(), atol=0, rtol=1e-3)


@pytest.mark.parametrize("name", ["sdxl", "sd3.5", "flux-dev", "klein"])
def test_a_bfloat16_base_trains(name: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    family = make(name, torch.bfloat16)
    plan = dataclasses.replace(LONG, updates=2, selection="esd_x_strict")
    trainer.train(family, plan, tmp_path, Accelerator(cpu=True, mixed_precision="bf16"))
    differences = checkpoint.load(tmp_path).differences
    assert all(difference.dtype == torch.float32 for difference in differences.values())
    assert sum(float(difference.abs().sum()) for difference in differences.values()) > 0


@pytest.mark.parametrize("name", ["sdxl-turbo", "sd3", "flux-schnell", "klein-base"])
def test_a_saved_pipeline_is_recognised(name: str, tmp_path: Path) -> None:
    family = shared(name)
    family.pipe.save_pretrained(tmp_path)
    again: Any = family_of(load_pipeline(tmp_path))
    assert (type(again), again.guidance) == (type(family), family.guidance)
    if name in MMDITS:
        again.max_tokens = tiny.TOKENS
    for key, tensor in family.encode(PROMPTS).tensors.items():
        torch.testing.assert_close(again.encode(PROMPTS).tensors[key], tensor)


@every
def test_the_teacher_is_the_base_bit_for_bit_while_the_student_moves(name: str) -> None:
    family = make(name)
    x, t = family.initial_noise(generators(1, 2)), torch.tensor([300.0, 900.0])
    cond = family.encode(PROMPTS)
    with torch.no_grad():
        base = family.predict(family.denoiser, x, t, cond)
        views = WeightViews(family.denoiser, family.select("esd_x").names)
        for parameter in views.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        assert torch.equal(family.predict(views.teacher, x, t, cond), base)
        assert (family.predict(views.student, x, t, cond) - base).abs().max() > 1e-3


@every
def test_gradients_reach_the_student_with_and_without_checkpointing(name: str) -> None:
    family = make(name)
    views = WeightViews(family.denoiser, family.select("esd_x").names)
    x, t, cond = family.initial_noise(generators(1, 2)), torch.tensor([300.0, 900.0]), family.encode(PROMPTS)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            family.denoiser.train().enable_gradient_checkpointing()
        family.predict(views.student, x, t, cond).square().mean().backward()
        found.append({key: p.grad.clone() for key, p in views.named_parameters().items() if p.grad is not None})
        family.denoiser.zero_grad()
    assert set(found[0]) == set(views.names)
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-6, rtol=1e-4)


@every
def test_a_prediction_does_not_depend_on_its_batch(name: str) -> None:
    family = shared(name)
    x, t = family.initial_noise(generators(1, 2, 3)), torch.tensor([3.0, 500.0, 999.0])
    cond = family.encode([*PROMPTS, ""])
    with torch.no_grad():
        together = family.predict(family.denoiser, x, t, cond)
        alone = family.predict(family.denoiser, x[1:2], t[1], cond[1])
    assert together.shape == x.shape and together.dtype == torch.float32
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


@every
def test_decoding_gives_the_stock_pipelines_images(name: str) -> None:
    family, guidance = shared(name), GUIDANCE[name]
    tokens = {"max_sequence_length": family.max_tokens} if hasattr(family, "max_tokens") else {}
    images = family.pipe(
        prompt=PROMPTS, guidance_scale=guidance, num_inference_steps=2, generator=generators(0, 1), output_type="pt",
        height=16, width=16, **tokens, **TOLD.get(family.name, {}),
    ).images  # fmt: skip
    latents = stock(family, PROMPTS, guidance, 2, height=16, width=16)
    torch.testing.assert_close(family.decode(latents), images, atol=1e-4, rtol=1e-4)


@every
def test_sizes_that_no_latents_have_are_refused(name: str) -> None:
    family = shared(name)
    multiple = family.pixels_per_latent * family.patch
    assert family.latent_shape(6 * multiple)[1:] == (6 * family.patch,) * 2
    with pytest.raises(UserError, match=f"multiples of {multiple} pixels"):
        family.latent_shape(6 * multiple + 1)


def test_sd3_draws_no_larger_than_its_positions_reach() -> None:
    with pytest.raises(UserError, match="at most 32 pixels"):
        shared("sd3").latent_shape(36)


@every
def test_every_parameter_has_a_role(name: str) -> None:
    for info in shared(name).parameter_infos():
        assert "other" not in (info.stack, info.part), info
        assert info.kind != "other" or info.part == "modulation", info  # a table that belongs to no layer
        assert info.part not in ("self", "cross", "joint", "ff", "proj") or info.projection, info


@every
def test_presets_match_something_and_esd_x_shares_nothing_with_esd_u(name: str) -> None:
    family = shared(name)
    if name == "sd3" or family.name.startswith("flux"):
        with pytest.raises(SelectionError, match=r"self"):  # only SD 3.5 has image self-attention
            family.select("self_attention")
    chosen = {p: set(family.select(p).names) for p in family.presets if (name, p) != ("sd3", "self_attention")}
    assert not chosen["esd_x"] & chosen["esd_u"]
    assert chosen["esd_x_strict"] < chosen["esd_x"]
    if family.name != "stable-diffusion-xl":  # upstream leaves the stem and the time embedding out there
        assert chosen["esd_x"] | chosen["esd_u"] == chosen["esd_all"]


def module_rule(denoiser: torch.nn.Module, keep: Any) -> set[str]:
    """Upstream's way: the parameters of Linear and Conv2d modules whose name fits."""
    return {
        f"{module_name}.{name}"
        for module_name, module in denoiser.named_modules()
        if type(module).__name__ in ("Linear", "Conv2d") and keep(module_name)
        for name, _ in module.named_parameters(recurse=False)
    }


RULES = {  # upstream's, by substrings of module names
    ("sdxl", "esd_x"): lambda m: "attn2" in m,
    ("sdxl", "esd_u"): lambda m: "attn2" not in m and "emb" not in m and "block" in m,
    ("sdxl", "esd_all"): lambda m: "emb" not in m and "block" in m,
    ("flux-dev", "esd_x"): lambda m: "attn" in m,
    ("flux-dev", "joint.k + joint.v"): lambda m: "attn.to_k" in m or "attn.to_v" in m,
    ("flux-dev", "esd_x_strict"): lambda m: any(f"attn.{p}" in m for p in ("to_k", "to_v", "add_k_proj", "add_v_proj")),
    ("klein", "esd_x"): lambda m: "attn" in m,
    ("sd3.5", "esd_x"): lambda m: ".attn." in m,
    ("sd3.5", "self_attention & linear"): lambda m: ".attn2." in m,
}


@pytest.mark.parametrize(("name", "expression"), RULES)
def test_selections_are_those_of_upstreams_rules(name: str, expression: str) -> None:
    family = shared(name)
    assert set(family.select(expression).names) == module_rule(family.denoiser, RULES[name, expression])


@pytest.mark.parametrize("name", sorted(MMDITS))
def test_a_preset_of_cross_attention_says_what_it_means_on_a_model_without_any(name: str) -> None:
    family = shared(name)
    assert "no cross-attention" in family.select("esd_x + time").describe().splitlines()[-1]
    assert not family.select("joint.k").notes
    with pytest.raises(SelectionError, match=r"'cross' matched nothing.*joint attention"):
        family.select("cross")


def test_attn2_is_image_self_attention_on_sd35_and_nothing_on_flux() -> None:
    assert shared("sd3.5").select("attn2").names == shared("sd3.5").select("self").names
    assert all(name.startswith("transformer_blocks.0.attn2") for name in shared("sd3.5").select("attn2").names)
    with pytest.raises(SelectionError, match="no cross-attention"):
        shared("flux-dev").select("attn2")


@pytest.mark.parametrize(("expression", "same"), [
    ("double.text.joint.add_k", "name:transformer_blocks.*add_k_proj*"),
    ("single[1].joint.q", "name:single_transformer_blocks.1.attn.to_q*"),
    ("text.ff", "name:*ff_context*"),
    ("in.text", "name:context_embedder*"),
])  # fmt: skip
def test_roles_of_the_two_streams(expression: str, same: str) -> None:
    assert shared("flux-dev").select(expression).names == shared("flux-dev").select(same).names


@pytest.mark.parametrize("name", ["sdxl", "sd3.5", "flux-dev", "klein"])
def test_fused_projections_are_refused(name: str) -> None:
    family = make(name)
    if name == "sd3.5":  # its own method refuses added projections; a user can still fuse one by one
        family.denoiser.transformer_blocks[0].attn2.fuse_projections()
    else:
        family.denoiser.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused projections"):
        family.select("esd_x")


def test_erased_weights_are_not_put_where_nothing_would_read_them(tmp_path: Path) -> None:
    pipe = tiny.every("sdxl")
    weight = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(16, 32)}
    base = {name: dict(pipe.unet.named_parameters())[name] for name in weight}
    checkpoint.save(tmp_path / "erased.safetensors", weight, {"fingerprint": checkpoint.fingerprint(base)})
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused projections"):
        esd.apply(pipe, tmp_path)


@pytest.mark.parametrize(
    ("name", "encoder"), [("sdxl", "text_encoder"), ("sd3", "text_encoder_2"), ("klein", "text_encoder")]
)
def test_a_missing_text_encoder_is_named(name: str, encoder: str) -> None:
    pipe = tiny.every(name)
    pipe.register_modules(**{encoder: None})
    with pytest.raises(UserError, match=f"has no {encoder};"):
        family_of(pipe)


def test_sd3_does_without_t5_as_its_pipeline_does(tmp_path: Path) -> None:
    pipe = tiny.every("sd3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    family = family_of(load_pipeline(tmp_path))
    family.max_tokens = tiny.TOKENS  # type: ignore[attr-defined]
    expected = stock(family, PROMPTS, 3.0, 2, height=16, width=16)
    torch.testing.assert_close(ours(family, PROMPTS, 3.0, 2, 16, 16), expected, atol=1e-4, rtol=1e-4)


def test_a_size_that_the_schedule_has_no_times_for_is_refused() -> None:
    with pytest.raises(UserError, match="are 4096 image tokens, for which the scheduler"):
        shared("flux-dev").scheduler(4, latent_shape=(4, 128, 128))


def test_another_scheduler_is_refused_on_a_flow_model() -> None:
    pipe = tiny.every("flux-dev")
    with pytest.raises(UserError, match="allowed: euler"):
        family_of(pipe).scheduler(4, "ddim")
    pipe.scheduler = tiny.pipeline().scheduler
    with pytest.raises(UserError, match="PNDMScheduler"):
        family_of(pipe)


def test_the_null_prompt_of_sdxl_is_zeros_unless_asked_otherwise() -> None:
    family = shared("sdxl")
    assert all(not tensor.any() for tensor in family.null().tensors.values())
    assert torch.equal(family.null("empty").tensors["text_embeds"], family.encode([""]).tensors["text_embeds"])
    expected = stock(family, PROMPTS, 3.0, 2, height=16, width=16, negative_prompt=["", ""])
    noise = generators(0, 1)
    drawn = rollout(
        family, family.denoiser, family.initial_noise(noise), family.encode(PROMPTS), family.null("empty"),
        num_steps=2, guidance_scale=3.0,
    ).final  # fmt: skip
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    for other in ("sd1", "sd3", "flux-dev"):
        with pytest.raises(UserError, match="null=zeros"):
            shared(other).null("zeros")


def calls_of_a_bank(family: Family, conditions: Conditions, sampling: Sampling) -> int:
    """Rows that the teacher evaluates beyond one rollout of 3 samples x 3 steps, per point."""
    rows = []

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        return family.denoiser(x, *args, **kwargs)  # type: ignore[operator]

    bank = Bank(family, counting, conditions, sampling, rollouts=3, reuse=1, per_update=3, seed=1)
    points = bank.points(0, range(3))
    with torch.no_grad():
        direct = family.predict(family.denoiser, points.x, points.t, conditions.concept[points.prompt])  # type: ignore[arg-type]
        null = family.predict(family.denoiser, points.x, points.t, conditions.null[[0] * 3])  # type: ignore[arg-type]
    torch.testing.assert_close(points.concept, direct, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(points.null, null, atol=2e-5, rtol=1e-3)
    passes = 2 if family.guidance == "cfg" and sampling.guidance_scale > 1 else 1
    return (sum(rows) - 9 * passes) // 9


@pytest.mark.parametrize(
    ("name", "told", "scale", "computed"),
    [
        ("sdxl", None, 3.0, 0),  # both halves of the guided batch
        ("sdxl-turbo", None, 0.0, 1),  # the null prompt's
        ("flux-schnell", None, 3.0, 1),
        ("klein", None, 3.0, 1),
        ("klein-base", None, 3.0, 0),
        ("flux-dev", 1.0, 3.5, 2),  # upstream: sampled at another embedded guidance than trained
        ("flux-dev", 3.5, 3.5, 1),
    ],
)
def test_what_a_bank_must_still_compute(name: str, told: float | None, scale: float, computed: int) -> None:
    family = shared(name)
    cond, null = family.encode(PROMPTS), family.null()
    if told is not None:
        cond, null = family.with_guidance(cond, told), family.with_guidance(null, told)
    sampling = dataclasses.replace(SAMPLING, guidance_scale=scale)
    assert calls_of_a_bank(family, Conditions(cond, null), sampling) == computed


def test_another_negative_prompt_than_the_objectives_is_not_free() -> None:
    family = shared("sdxl")
    conditions = Conditions(family.encode(PROMPTS), family.null("empty"), negative=family.null("zeros"))
    assert calls_of_a_bank(family, conditions, SAMPLING) == 1


def test_points_shown_unscaled_are_larger_by_what_euler_divides_by_and_nothing_is_free() -> None:
    family = shared("sdxl")
    conditions, unscaled = (
        Conditions(family.encode(PROMPTS), family.null()),
        dataclasses.replace(SAMPLING, scaled_input=False),
    )
    assert calls_of_a_bank(family, conditions, unscaled) == 2
    settings: dict[str, Any] = {"rollouts": 3, "reuse": 1, "per_update": 9, "seed": 1}
    scaled, raw = (
        Bank(family, family.denoiser, conditions, how, **settings).points(0, range(9)) for how in (SAMPLING, unscaled)
    )
    solver = family.scheduler(SAMPLING.num_steps)
    sigma = torch.stack([solver.sigmas[solver.timesteps.tolist().index(t)] for t in raw.t.tolist()])
    torch.testing.assert_close(raw.x, scaled.x * (sigma**2 + 1).sqrt().view(-1, 1, 1, 1))
    with pytest.raises(UserError, match="gives x_t to the denoiser as it is"):
        Bank(shared("sd1"), family.denoiser, conditions, unscaled, **settings)


def test_only_a_model_distilled_for_it_can_be_told_a_guidance_scale() -> None:
    plan = dataclasses.replace(LONG, objective=Objective(embedded_guidance=3.5))
    with pytest.raises(UserError, match=r"embedded_guidance=3.5: stable-diffusion-xl is not told"):
        describe(shared("sdxl"), plan)
    assert "told guidance 3 (teacher and student: 3.5)" in describe(shared("flux-dev"), plan)


@pytest.mark.parametrize("name", ["flux-dev", "klein"])
def test_only_a_model_with_classifier_free_guidance_takes_a_negative_prompt(name: str) -> None:
    plan = dataclasses.replace(LONG, sampling=dataclasses.replace(SAMPLING, negative="empty"))
    with pytest.raises(UserError, match=r"trajectory\.negative=empty: .* takes no classifier-free guidance"):
        describe(shared(name), plan)


def test_guidance_that_a_model_does_not_want_is_legal_and_told() -> None:
    assert "mind" in describe(shared("sdxl-turbo"), LONG)
    assert "mind" in describe(shared("flux-schnell"), LONG)
    assert "mind" not in describe(shared("sdxl"), LONG)
    quiet = dataclasses.replace(LONG, sampling=dataclasses.replace(SAMPLING, num_steps=2, guidance_scale=0.0))
    told = describe(shared("sdxl-turbo"), quiet)
    assert "mind" not in told and "in 2 steps without guidance" in told
    told = describe(shared("sdxl-turbo"), LONG, drawn=(20, 4.0))
    assert "mind       trajectory.guidance_scale=3:" in told and "mind       evaluation.guidance_scale=4:" in told
    told = describe(shared("sdxl-turbo"), quiet, drawn=(20, 4.0))
    assert "trajectory.guidance_scale" not in told and "mind       evaluation.guidance_scale=4:" in told


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux-dev", "klein"])
def test_what_no_text_encoder_reads_is_told(name: str) -> None:
    family = shared(name)
    end = "of the rose " * 12
    assert not family.cut(["a cat"])
    cut = family.cut([f"a cat {end}"])[f"a cat {end}"]
    assert cut and end.strip().endswith(cut)


@every
def test_what_clip_leaves_out_and_t5_reads_is_told(name: str) -> None:
    family = make(name)
    several = family.name in ("stable-diffusion-3", "flux")
    if several:
        family.max_tokens = 60  # of T5; CLIP's reads 12 here
    end, plan = "of the rose " * 3, dataclasses.replace(LONG, prompts=("a cat", "a cat " + "of the rose " * 3))
    assert ("only T5 reads the end, CLIP not" in describe(family, plan)) == several
    for left in family.partly_read(plan.prompts).values():
        assert left and end.strip().endswith(left)


def test_rollouts_that_draw_the_concept_whatever_is_set_are_told() -> None:
    plan = dataclasses.replace(LONG, sample_with="concept")
    assert "without erase_from every rollout is of the concept" in describe(shared("sd1"), plan)
    anchored = {"erase_from": ("a dog",) * len(plan.prompts), "objective": Objective(anchor="erase_from")}
    for chosen, told in {"concept": "; rollouts draw the concept", "erase_from": ", which rollouts draw"}.items():
        lines = describe(shared("sd1"), dataclasses.replace(plan, sample_with=chosen, **anchored)).splitlines()
        assert next(line for line in lines if line.startswith("from")).endswith(f"'a dog'{told}")


@pytest.mark.parametrize("phase", [(), ("encoders",), ("denoiser",), ("denoiser", "vae")])
def test_what_a_phase_needs_is_on_the_device_and_the_rest_on_the_cpu(phase: tuple[Any, ...]) -> None:
    pipe = tiny.every("sd3")
    family = family_of(pipe, "meta")  # stands in for a card
    family.place(*phase)
    there = {name for name in ("encoders", "denoiser", "vae") if name in phase}
    expected = {
        "encoders": [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3],
        "denoiser": [pipe.transformer],
        "vae": [pipe.vae],
    }
    for part, modules in expected.items():
        assert {next(module.parameters()).device.type for module in modules} == {"meta" if part in there else "cpu"}


def test_every_part_works_only_in_a_phase_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training goes through them: the encoders, then the denoiser, and never both."""
    family, now, used = make("flux-dev"), ["all"], []
    place = family.place
    monkeypatch.setattr(family, "place", lambda *parts: (place(*parts), now.append(" ".join(parts))))
    pipe = family.pipe
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: used.append((now[-1], name)))
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.train(family, dataclasses.replace(LONG, updates=1), tmp_path, Accelerator(cpu=True))
    assert now == ["all", "encoders", "denoiser", ""]
    assert set(used) == {("encoders", "text_encoder"), ("encoders", "text_encoder_2"), ("denoiser", "transformer")}
