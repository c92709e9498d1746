"""Interventions leave no trace, know when they are called, and do what their formulas say, on every family."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from torch import nn

from esd.errors import UserError
from esd.families.base import Conditioning
from esd.interventions import (
    CrossSeed,
    Graft,
    InjectText,
    Patch,
    Record,
    Scale,
    Skip,
    Source,
    Transplant,
    attach,
    layers,
    resolve,
    sample,
)
from esd.selection import SelectionError
from tests import tiny
from tests.families import GUIDANCE, MMDITS, TEXT, UNETS, close, drawn, every, make, shared

BLOCKS = TEXT | {"sd3": "double", "sd3.5": "double"}  # that read the text, attention and all
A, B = "a cat", "the dog in mosaic style"
NAN = float("nan")


@every
def test_nothing_is_left_behind_even_after_an_exception(name: str) -> None:
    family = make(name)
    before = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    plain = drawn(name, family=family)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in family.denoiser.modules()]
    skipped = drawn(name, Skip(layers(family)[-1].label if name in MMDITS else "mid"), family=family)
    assert not torch.equal(skipped, plain)
    twice = Graft("all", weights={key: 2 * value for key, value in before.items()})
    with pytest.raises(ZeroDivisionError):
        drawn(name, twice, Record("all - out", reduce=lambda _: torch.zeros(1 // 0)), family=family)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in family.denoiser.modules()]
    assert all(torch.equal(value, before[key]) for key, value in family.denoiser.state_dict().items())
    assert torch.equal(drawn(name, family=family), plain)
    assert not {"step", "set_timesteps"} & set(vars(family.pipe.scheduler))


@every
def test_what_a_run_injects_into_itself_changes_nothing(name: str) -> None:
    itself = Source(A, 0)
    plain = drawn(name)
    for op in (
        InjectText(BLOCKS[name], source=itself),
        InjectText(BLOCKS[name], source=itself, flow=False),
        CrossSeed(" + ".join(dict.fromkeys(site.stack for site in layers(shared(name)))) if name in MMDITS else "cross",
                  source=itself),
        Patch("ff", source=itself),
    ):  # fmt: skip
        assert close(drawn(name, op), plain), op


@every
def test_another_prompts_text_at_every_layer_that_reads_it_is_that_prompt(name: str) -> None:
    """... with the own noise and the own pooled prompt; where the text flows on, at the first layer alone."""
    family = shared(name)
    where = BLOCKS[name] if name in UNETS else "double[0]"
    injected = drawn(name, InjectText(where, source=Source(B, 5), on="cond"))
    own, other = family.encode([A]), family.encode([B])
    mixed = Conditioning({**own.tensors, "encoder_hidden_states": other.tensors["encoder_hidden_states"]})
    family._encoded["mixed"] = mixed
    assert close(injected, drawn(name, prompts=["mixed"]))
    assert not close(injected, drawn(name))


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "klein", "klein-base"])
def test_a_weight_on_the_text_is_lost_in_the_last_single_block(name: str) -> None:
    family, other = shared(name), Source(B, 1)
    last = layers(family)[-1].label.replace(".", "[") + "]"
    one, ten = (drawn(name, InjectText(last, source=other, weight=w, flow=False)) for w in (1.0, 10.0))
    assert torch.equal(one, ten) and not close(one, drawn(name))
    one, ten = (drawn(name, InjectText("double[0]", source=other, weight=w, flow=False)) for w in (1.0, 10.0))
    assert not close(one, ten)


@pytest.mark.parametrize("name", MMDITS)
def test_the_other_seed_comes_in_after_the_first_layer_only(name: str) -> None:
    def apart(where: str) -> float:
        one, two = (drawn(name, Transplant(where, source=Source(B, seed))) for seed in (1, 2))
        return float((one - two).abs().max())

    second = "double[1].text" if name in ("sd3", "sd3.5") else "single[0].text"
    assert apart(second) > max(1e-6, 5 * apart("double[0].text"))


@every
def test_every_contribution_of_another_model_makes_its_picture(name: str) -> None:
    base, changed = shared(name), make(name)
    for parameter in changed.denoiser.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    where = "all - out"
    record = Record(where, what="contribution") if name in MMDITS else Record("all", what="output")
    expected = drawn(name, record)
    assert not close(drawn(name, family=changed), expected)
    weights = {key: value.detach() for key, value in base.denoiser.named_parameters()}
    assert close(drawn(name, Graft("all", weights=weights), family=changed), expected)
    if name in UNETS:
        patched = drawn(name, Patch("all", source=record.recording, what="output"), family=changed)
    else:
        out = Graft("all", weights={k: v for k, v in weights.items() if not k.startswith(("transformer", "single_"))})
        patched = drawn(name, Patch(where, source=record.recording), out, family=changed)
    assert close(patched, expected)


def test_channels_of_an_input_are_patched_apart_or_together() -> None:
    how: Any = {"source": Source(B, 1), "what": "input"}
    low, high = (Patch("up.cross.out", **how, channels=part) for part in ((0, 4), (4, 8)))
    found = [drawn("sd1"), *(drawn("sd1", *ops) for ops in ((low,), (high,), (low, high)))]
    assert close(found[-1], drawn("sd1", Patch("up.cross.out", **how)))
    assert not any(close(one, other) for i, one in enumerate(found) for other in found[:i])


@every
def test_leaving_everything_out_that_a_scale_of_zero_leaves_out(name: str) -> None:
    where = "ff" if name in UNETS else "double"
    assert close(drawn(name, Skip(where)), drawn(name, Scale(where, activation=0.0)))
    assert close(drawn(name, Scale(where, activation=0.5), Scale(where, activation=2.0)), drawn(name))
    assert not close(drawn(name, Skip(where)), drawn(name))


@pytest.mark.parametrize("rows", [(0,), (1,)])
def test_an_op_on_some_rows_leaves_the_others(rows: tuple[int, ...]) -> None:
    plain = drawn("sd1", prompts=(A, B), seeds=(0, 1))
    changed = drawn("sd1", Skip("cross", rows=rows), prompts=(A, B), seeds=(0, 1))
    same = [torch.equal(one, other) for one, other in zip(plain, changed, strict=True)]
    assert same == [row not in rows for row in range(2)]


@pytest.mark.parametrize("name", [name for name in GUIDANCE if shared(name).guidance == "cfg" and GUIDANCE[name] > 1])
def test_an_op_on_one_pass_works_in_that_half_of_the_batch(name: str) -> None:
    found = [drawn(name), *(drawn(name, Skip("ff", on=on)) for on in ("cond", "uncond", "both"))]
    assert not any(close(one, other) for i, one in enumerate(found) for other in found[:i])


def test_the_null_pass_is_that_of_the_null_prompt() -> None:
    null, plain = Record("mid.ff", on="uncond"), Record("mid.ff", on="cond")
    drawn("sd1", null, prompts=(A,))
    drawn("sd1", plain, prompts=("",))
    first, other = (record.recording.of("mid.0.attentions.0.block.0.ff")[0] for record in (null, plain))
    assert close(first, other), "in the first step, where both have the same noise"


SOLVERS = {
    "euler": (EulerDiscreteScheduler, dict.fromkeys(range(5), 1)),
    "dpm++": (DPMSolverMultistepScheduler, dict.fromkeys(range(5), 1)),
    "heun": (HeunDiscreteScheduler, {0: 2, 1: 2, 2: 2, 3: 2, 4: 1}),
    "pndm": (PNDMScheduler, {0: 2, 1: 1, 2: 1, 3: 1, 4: 1}),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stock", [True, False])
def test_the_clock_knows_the_step_however_often_a_solver_calls(solver: str, stock: bool) -> None:
    kind, expected = SOLVERS[solver]
    family = make("sd1")
    record = Record("mid.ff", reduce=lambda x: x.flatten(1).norm(dim=1))
    if stock:
        family.pipe.scheduler = kind.from_config(family.pipe.scheduler.config)
        with attach(family, record):
            family.pipe("a cat", num_inference_steps=5, guidance_scale=3.0, output_type="latent")
    else:
        sample(family, [A], [0], record, num_steps=5, guidance_scale=3.0, scheduler=solver)
    assert Counter(key.step for key in record.recording.values) == expected
    assert {key.passes for key in record.recording.values} == {("uncond", "cond")}


@pytest.mark.parametrize("stock", [True, False])
def test_the_clock_knows_the_one_step_of_turbo(stock: bool) -> None:
    family = shared("sdxl-turbo")
    record = Record("mid.ff", reduce=lambda x: x.flatten(1).norm(dim=1), steps=(0, 1))
    if stock:
        with attach(family, record):
            family.pipe(A, num_inference_steps=1, guidance_scale=0.0, output_type="latent")
    else:
        drawn("sdxl-turbo", record, num_steps=1)
    assert {key[2:] for key in record.recording.values} == {(0, 0, ("cond",))}


@pytest.mark.parametrize("name", ["flux-dev", "klein-base"])
def test_the_clock_knows_the_step_where_the_denoiser_is_told_a_rounded_time(name: str) -> None:
    """bfloat16 has steps of 4 above 512, and the times of a hundred steps lie closer."""
    family = make(name)
    family.pipe.to(torch.bfloat16)
    record = Record("double[0].ff & double.image", reduce=lambda x: x.flatten(1).norm(dim=1), on="cond")
    with attach(family, record):
        family.pipe(
            prompt=A, num_inference_steps=100, guidance_scale=GUIDANCE[name], output_type="latent",
            max_sequence_length=tiny.TOKENS,
        )  # fmt: skip
    assert [key.step for key in record.recording.values] == [*range(100)]


def test_guidance_by_skipped_layers_evaluates_the_prompt_once_more() -> None:
    """... alone, in as many rows as there are samples, none of which is the null prompt's."""
    family = make("sd3.5")
    record = Record("double[0].ff", reduce=lambda x: x.flatten(1).norm(dim=1), on="cond")

    def stock(*ops: Any) -> torch.Tensor:
        with attach(family, *ops):
            found = family.pipe(
                A, num_inference_steps=3, guidance_scale=4.0, skip_guidance_layers=[1], skip_layer_guidance_start=0.0,
                skip_layer_guidance_stop=1.0, output_type="latent", max_sequence_length=tiny.TOKENS,
                num_images_per_prompt=2, generator=[torch.Generator().manual_seed(i) for i in range(2)],
            )  # fmt: skip
        return found.images

    plain = stock(record)
    calls = {key[2:] for key in record.recording.values}
    both: Any = ("uncond", "cond")
    assert calls == {(0, 0, both), (1, 0, both), (2, 0, both), (1, 1, ("cond",)), (2, 1, ("cond",))}
    assert all(len(value) == 2 for value in record.recording.values.values())
    assert record.recording.of("double.0.ff").shape == (3, 2)
    first, second = stock(Skip("double[0].ff", rows=(0,)))
    assert torch.equal(second, plain[1]) and not close(first, plain[0])


@every
def test_a_stock_pipeline_under_ops_draws_what_sample_draws(name: str) -> None:
    family = make(name)
    ops = (Skip("ff", steps=(0, 1)), Scale("ff", activation=0.5, on="cond", steps=(0.5, 1.0)))
    length = {"max_sequence_length": tiny.TOKENS} if name in MMDITS else {}
    with attach(family, *ops):
        stock = family.pipe(
            prompt=A, num_inference_steps=3, guidance_scale=GUIDANCE[name], output_type="np",
            generator=[torch.Generator().manual_seed(0)], **length,
        ).images  # fmt: skip
    ours = family.decode(drawn(name, *ops, family=family)).permute(0, 2, 3, 1)
    assert torch.allclose(torch.as_tensor(stock), ours, atol=1e-4)
    assert not torch.allclose(family.decode(drawn(name, family=family)).permute(0, 2, 3, 1), ours, atol=1e-4)


@pytest.mark.parametrize("name", ["sd1", "flux-dev", "klein-base", "sd3.5"])
def test_gradients_are_the_same_under_checkpointing(name: str) -> None:
    family = make(name)
    family.denoiser.requires_grad_(True).train()
    noise, cond = family.initial_noise([torch.Generator().manual_seed(0)]), family.encode([A])
    gradients = []
    for on in (False, True):
        family.denoiser.zero_grad()
        family.denoiser.gradient_checkpointing = False
        (family.denoiser.enable_gradient_checkpointing if on else family.denoiser.disable_gradient_checkpointing)()
        with attach(family, Scale("ff", activation=3.0)):
            family.predict(family.denoiser, noise, torch.tensor(500.0), cond).square().mean().backward()
        gradients.append([p.grad.clone() for p in family.denoiser.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_graft_holds_in_its_steps_only() -> None:
    family = make("sd1")
    weights = {name: torch.zeros_like(p) for name, p in family.denoiser.named_parameters()}
    half, whole = (
        drawn("sd1", Graft("cross.v", weights=weights, steps=steps), family=family)
        for steps in ((0.0, 0.5), (0.0, 1.0))
    )
    assert not close(half, drawn("sd1", family=family)) and not close(half, whole)
    assert close(whole, drawn("sd1", Graft("cross.v", weights=weights), family=family))


def test_grafts_of_the_same_weights_take_turns() -> None:
    family = make("sd1")
    zeros = {name: torch.zeros_like(p) for name, p in family.denoiser.named_parameters()}
    first, last = (Graft("cross.v", weights=zeros, steps=steps) for steps in ((0, 1), (2, 3)))
    found = [drawn("sd1", *ops, family=family) for ops in ((), (first,), (last,), (first, last))]
    assert not any(close(one, other) for i, one in enumerate(found) for other in found[:i])
    assert torch.equal(drawn("sd1", last, first, family=family), found[-1])
    whole = drawn("sd1", first, Graft("cross.v", weights=zeros, steps=(1, 3)), family=family)
    assert torch.equal(whole, drawn("sd1", Graft("cross.v", weights=zeros), family=family))
    twice = drawn("sd1", Graft("cross.v", weights=zeros), first, family=family)
    assert torch.equal(twice, whole), "what one puts in, another does not take out"


def test_weights_are_not_grafted_into_a_model_that_does_not_draw() -> None:
    family = make("sd1")
    zeros = {name: torch.zeros_like(p) for name, p in family.denoiser.named_parameters()}
    with pytest.raises(UserError, match="Graft: it changes the family's own denoiser, and another is to draw"):
        drawn("sd1", Graft("cross.v", weights=zeros), family=family, denoiser=make("sd1").denoiser)


def test_ops_that_would_not_know_a_rollouts_passes_are_refused() -> None:
    family = make("sd1")
    with attach(family, Skip("cross", on="cond")), pytest.raises(UserError, match="give the ops to sample"):
        drawn("sd1", family=family)
    other = HeunDiscreteScheduler.from_config(family.pipe.scheduler.config)
    with attach(family, Skip("cross", on="cond")), pytest.raises(UserError, match="scheduler was replaced"):
        family.pipe.scheduler = other
        family.pipe(A, num_inference_steps=2, output_type="latent")


def test_a_recording_fits_a_sampling_like_its_own() -> None:
    record = Record("mid.ff", what="contribution")
    drawn("sd1", record, num_steps=2)
    patch = Patch("mid.ff", source=record.recording)
    drawn("sd1", patch, num_steps=2, seeds=(7,))
    family, calls = make("sd1"), []
    family.denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    again = replace(patch, where="mid.ff", steps=(0, 2))
    for told, op, how in (
        ("steps=2, and here steps=4", patch, {"num_steps": 4}),
        ("steps=2, and here steps=4", again, {"num_steps": 4}),
        ("samples=1, and here samples=2", patch, {"num_steps": 2, "prompts": (A, B), "seeds": (0, 1)}),
        ("on=both, and here on=cond", replace(patch, on="cond"), {"num_steps": 2}),
    ):
        with pytest.raises(UserError, match=told):
            drawn("sd1", op, family=family, **how)
    assert not calls
    with pytest.raises(UserError, match=r"with latents=\(8, 8\), and here latents=\(16, 16\)"):
        drawn("sd2-v", patch, num_steps=2)
    record.recording.values = {key: value[..., :4] for key, value in record.recording.values.items()}
    with pytest.raises(UserError, match=r", 4\) was recorded in step 0, .* models of one architecture"):
        drawn("sd1", patch, num_steps=2)


def test_a_recording_tells_layer_by_step() -> None:
    record = Record("down.self", reduce=lambda x: x.flatten(1).norm(dim=1), on="cond")
    drawn("sd1", record, prompts=(A, B), seeds=(0, 1))
    assert record.recording.of("down.0.attentions.0.block.0.self").shape == (3, 2)
    with pytest.raises(UserError, match=r"nothing was recorded of the text stream of 'down.*self'; recorded: down"):
        record.recording.of("down.0.attentions.0.block.0.self", "text")


def test_a_recording_is_of_the_latest_sampling_alone() -> None:
    family, record = make("sd1"), Record("mid.ff", reduce=lambda x: x.flatten(1).norm(dim=1), on="cond")
    drawn("sd1", record, num_steps=4, prompts=(A, B))
    drawn("sd1", record, num_steps=2)
    assert record.recording.of("mid.0.attentions.0.block.0.ff").shape == (2, 1)
    with attach(family, record):
        for steps in (3, 1):
            family.pipe(A, num_inference_steps=steps, output_type="latent")
            assert {key.step for key in record.recording.values} == {*range(steps)}
    assert record.recording.gib == sum(value.nbytes for value in record.recording.values.values()) / 2**30


def test_a_layer_with_an_adapter_on_it_is_one_site() -> None:
    from peft import LoraConfig

    family = make("sd1")
    family.denoiser.add_adapter(LoraConfig(r=2, target_modules=r".*attn2.to_v", init_lora_weights=False))
    assert [site.label for site in resolve(family, "cross.v")] == [
        site.label for site in resolve(shared("sd1"), "cross.v")
    ]
    plain, scaled = Record("mid.cross.v"), Record("mid.cross.v")
    drawn("sd1", plain, family=family)
    drawn("sd1", Scale("mid.cross.v", activation=2.0), scaled, family=family)
    label = "mid.0.attentions.0.block.0.cross.v"
    assert close(scaled.recording.of(label), 2 * plain.recording.of(label))  # the text that goes in is the same
    assert close(drawn("sd1", Skip("cross.v"), family=family), drawn("sd1", Skip("cross.v")))


def test_weights_that_come_from_elsewhere_cannot_be_grafted() -> None:
    from accelerate import cpu_offload

    family = make("sd1")
    weights = {key: torch.zeros_like(value) for key, value in family.denoiser.named_parameters()}
    skipped = drawn("sd1", Skip("cross"))
    cpu_offload(family.denoiser, execution_device=torch.device("cpu"))
    assert torch.equal(drawn("sd1", Skip("cross"), family=family), skipped)
    with pytest.raises(UserError, match="sequential CPU offload"):
        drawn("sd1", Graft("cross.v", weights=weights), family=family)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_that_are_offloaded_can_be_grafted(kind: str) -> None:
    from diffusers.hooks import apply_group_offloading

    family, cpu = make("sd1"), torch.device("cpu")
    graft = Graft("cross.v", weights={key: torch.zeros_like(p) for key, p in family.denoiser.named_parameters()})
    expected = drawn("sd1", graft)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(family.denoiser, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert torch.equal(drawn("sd1", graft, family=family), expected) and not close(expected, drawn("sd1"))
    assert torch.equal(drawn("sd1", family=family), drawn("sd1"))


def test_sites_are_the_largest_modules_named() -> None:
    assert [site.label for site in resolve(shared("flux-dev"), "double + single[1]")] == ["double.0", "single.1"]
    assert [site.stream for site in resolve(shared("flux-dev"), "single.text")] == ["text", "text"]
    assert [site.label for site in resolve(shared("sd1"), "up.cross.v")] == [
        "up.1.attentions.0.block.0.cross.v", "up.1.attentions.1.block.0.cross.v",
    ]  # fmt: skip
    order = [site.label for site in resolve(shared("sd1"), "down + mid")]
    assert order == [
        "down.0.resnets.0", "down.0.attentions.0", "down.0.downsamplers.0.sampler", "down.1.resnets.0",
        "mid.0.resnets.0", "mid.0.attentions.0", "mid.0.resnets.1",
    ]  # fmt: skip


BAD = {
    "matched nothing": lambda: Skip("crosss"),
    "changes the shape": lambda: Skip("up[0].resnet"),
    "reads no text": lambda: InjectText("self", source=Source(A, 0)),
    "leave weight=1": lambda: InjectText("cross", source=Source(A, 0), weight=2.0),
    "changes nothing": lambda: Scale("cross"),
    "allowed: numbers such as": lambda: Skip("cross", steps=(3, 3)),
    "fractions such as": lambda: Skip("cross", steps=(0.0, 5.0)),
    "allowed: cond, uncond, both": lambda: Skip("cross", on="neither"),  # type: ignore[arg-type]
    "allowed: input, output": lambda: Record("cross", what="neither"),  # type: ignore[arg-type]
    r"channels=\(4, 4\)\): allowed: numbers": lambda: Patch("cross.out", source=Source(B, 0), channels=(4, 4)),
    "the input of a linear layer has some": lambda: Patch("cross", source=Source(B, 0), what="input", channels=(0, 4)),
    r"\(0, 999\)\): the input of .* has": lambda: Patch(
        "cross.out", source=Source(B, 0), what="input", channels=(0, 999)
    ),
    "what='outptu'": lambda: Patch("cross", source=Source(B, 0), what="outptu"),  # type: ignore[arg-type]
    r"Scale\(activation=nan": lambda: Scale("cross", activation=NAN),
    r"Scale\(residual=inf": lambda: Scale("mid", residual=float("inf")),
    r"InjectText\(weight=nan": lambda: InjectText("cross", source=Source(B, 0), weight=NAN),
    r"Record\(max_gib=nan": lambda: Record("cross", max_gib=NAN),
    r"Skip\(rows=1\): allowed: 0 or more, below 1": lambda: Skip("cross", rows=(1,)),
    r"rows=\(\)": lambda: Skip("cross", rows=()),
    r"rows=\(-1,\)": lambda: Skip("cross", rows=(-1,)),
    r"rows=\(0, 0\)": lambda: Skip("cross", rows=(0, 0)),
    r"CrossSeed\(source=4\): allowed: 0 or more, below 1": lambda: CrossSeed("cross", source=4),
    r"CrossSeed\(source=-1\)": lambda: CrossSeed("cross", source=-1),
    r"allowed: Source\('a dog', seed\)": lambda: CrossSeed("cross", source="a dog"),  # type: ignore[arg-type]
    "takes from sample 0 what that has itself": lambda: Patch("cross"),
    r"steps=\(30, 40\) reaches beyond the 3 steps": lambda: Skip("cross", steps=(30, 40)),
    r"steps=\(0, 4\) reaches beyond": lambda: Skip("cross", steps=(0, 4)),
    r"steps=\(0.0, 0.1\) holds none of the 3 steps": lambda: Skip("cross", steps=(0.0, 0.1)),
    r"steps='ab'": lambda: Skip("cross", steps="ab"),  # type: ignore[arg-type]
    r"steps=\(0, nan\)": lambda: Skip("cross", steps=(0, NAN)),
    r"steps=\(0, 1, 2\)": lambda: Skip("cross", steps=(0, 1, 2)),  # type: ignore[arg-type]
    "of another model": lambda: Skip(resolve(shared("sd2-v"), "cross")),
    "no site is given": lambda: Skip([]),
    "sites that resolve": lambda: Skip(["mid"]),  # type: ignore[list-item]
    "max_gib": lambda: Record("all", what="output", max_gib=1e-9),
    "record what='contribution' whole": lambda: Patch("cross", source=Record("cross").recording),
    "holds nothing of": lambda: Patch("cross", source=Record("self").recording, what="output"),
    "names no parameter": lambda: Graft("cross", weights={"conv_in.bias": torch.zeros(8)}),
    "has no none, which the weights have": lambda: Graft("cross", weights={"none": torch.zeros(1)}),
    "of the same architecture": lambda: Graft("in", weights={"conv_in.bias": torch.zeros(1)}),
    "whole batch": lambda: Graft("cross", weights={}, rows=(0,)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_work_is_refused_in_words(message: str) -> None:
    with pytest.raises((UserError, SelectionError), match=message):
        drawn("sd1", BAD[message]())


AHEAD = {  # what only a sampling tells, not the op nor the model
    "reaches beyond": lambda: Skip("cross", steps=(2, 9)),
    "holds none": lambda: Skip("cross", steps=(0.0, 0.1)),
    "rows=1": lambda: Skip("cross", rows=(1,)),
    "source=1": lambda: CrossSeed("cross", source=1),
    "what that has itself": lambda: CrossSeed("cross", source=0),
}


@pytest.mark.parametrize("message", AHEAD)
@pytest.mark.parametrize("stock", [True, False])
def test_what_fits_no_sampling_is_refused_before_a_site_is_called(message: str, stock: bool) -> None:
    family, calls = make("sd1"), []
    family.denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=message):
        if stock:
            with attach(family, AHEAD[message]()):
                family.pipe(A, num_inference_steps=3, output_type="latent")
        else:
            drawn("sd1", AHEAD[message](), family=family)
    assert not calls


@pytest.mark.parametrize("name", ["sd1", "flux-dev", "klein-base"])
def test_a_null_prompt_that_nobody_evaluates_cannot_be_worked_on(name: str) -> None:
    family, op = make(name), Skip("ff", on="uncond")
    for scale in (1.0, GUIDANCE[name]):
        guided = family.guidance == "cfg" and scale > 1
        for stock in (True, False):
            with nullcontext() if guided else pytest.raises(UserError, match="null prompt is not evaluated"):
                if stock:
                    length = {"max_sequence_length": tiny.TOKENS} if name in MMDITS else {}
                    with attach(family, op):
                        family.pipe(
                            prompt=A, num_inference_steps=1, guidance_scale=scale, output_type="latent", **length
                        )
                else:
                    drawn(name, op, family=family, num_steps=1, guidance_scale=scale)


def test_a_scale_of_guidance_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="guidance_scale=nan: allowed: a finite number"):
        drawn("sd1", guidance_scale=NAN)


def test_a_source_that_nobody_draws_is_refused() -> None:
    with (
        pytest.raises(UserError, match="sample puts it there"),
        attach(shared("sd1"), CrossSeed("cross", source=Source(A, 0))),
    ):
        pass


def test_steps_are_refused_where_nothing_samples() -> None:
    family = shared("sd1")
    with pytest.raises(UserError, match="outside of sampling"), attach(family, Skip("cross", steps=(0, 1))):
        family.predict(
            family.denoiser, family.initial_noise([torch.Generator()]), torch.tensor(1.0), family.encode([A])
        )


def test_a_model_whose_hooks_would_miss_calls_is_refused() -> None:
    family = make("sd1")
    family.denoiser.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused"), attach(family, Skip("cross")):
        pass
    family = make("sd1")
    block: nn.Module = family.denoiser.mid_block
    block.compile()
    with pytest.raises(UserError, match="compiled"), attach(family, Skip("cross")):
        pass
    family = make("sd1")
    family.denoiser.forward = torch.compile(family.denoiser.forward)
    with pytest.raises(UserError, match="compiled"), attach(family, Skip("cross")):
        pass
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    for put_on in (lambda denoiser, how: denoiser.enable_cache(how), apply_first_block_cache):
        family = make("flux-dev")
        put_on(family.denoiser, FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(UserError, match="disable_cache"), attach(family, Skip("double")):
            pass


@every
def test_a_site_can_be_named_alone(name: str) -> None:
    family = shared(name)
    streams = (
        [site for where in ("double.text", "double.image") for site in resolve(family, where)] if name in MMDITS else []
    )
    for site in [*layers(family), *resolve(family, "ff"), *streams]:
        assert resolve(family, site.expression) == [site], site.expression
