"""Frozen weights in float8: exactly the model with its weights rounded, in all passes; the base again afterwards."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import esd
from esd import checkpoint, float8, trainer
from esd.description import describe
from esd.errors import UserError
from esd.families import family_of, load_pipeline
from esd.lora import Lora, LoraViews
from esd.plan import TrainPlan
from esd.trajectory import predict_many, rollout
from tests import published, tiny
from tests.plans import PLAN
from tests.programs import Command
from tests.programs import train as train_program

some = pytest.mark.parametrize("name", ["sd1", "sd3.5", "flux-dev"])
THIN = dataclasses.replace(
    PLAN, lora=Lora(3, 3.0), frozen="float8", selection="esd_x", rollouts=2, reuse=60, updates=12, batch_size=6, lr=2e-2
)


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    family = family_of(tiny.every(name).to(dtype))
    if hasattr(family, "max_tokens"):
        family.max_tokens = tiny.TOKENS
    return family


def rounded(weight: Tensor) -> Tensor:
    """A matrix through float8 and back, times the largest power of two that keeps it within float8's 448."""
    power = 2.0 ** math.floor(math.log2(448 / float(weight.abs().max())))
    return ((weight.float() * power).to(torch.float8_e4m3fn).float() / power).to(weight.dtype)


def point(family: Any) -> tuple[Any, ...]:
    return torch.randn(2, *family.sample_shape), torch.tensor([300.0, 900.0]), family.encode(["a cat", "a dog"])


def learned(family: Any, at: tuple[Any, ...], autocast: bool) -> list[Tensor]:
    """A prediction with an adapter on, the gradients of the adapter, and that of the latents."""
    views = LoraViews(family.denoiser, family.select("esd_x").names, Lora(2, 2.0), seed=0)
    torch.manual_seed(1)
    for parameter in views.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = at[0].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = family.predict(views.student, x, *at[1:])
    prediction.square().sum().backward()
    found = [prediction.detach(), x.grad, *(parameter.grad for parameter in views.parameters())]
    views.restore()
    return found


@some
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prediction_and_gradients_are_those_of_the_rounded_weights(
    name: str, checkpointing: bool, dtype: torch.dtype
) -> None:
    family, other = make(name, dtype), make(name, dtype)
    layers = float8.linears(other.denoiser)
    assert layers
    for layer in layers:
        layer.weight.data = rounded(layer.weight.data)
    at = point(family)
    for one in (family, other) if checkpointing else ():
        one.denoiser.enable_gradient_checkpointing()
    autocast = dtype == torch.bfloat16
    with float8.stored(family.denoiser):
        got = learned(family, at, autocast)
    expected = learned(other, at, autocast)
    assert torch.equal(got[0], expected[0]) and expected[1].any()
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    assert not torch.allclose(learned(family, at, autocast)[0], got[0], rtol=1e-4)  # not stored, it rounds nothing


def test_nothing_as_wide_as_the_weights_waits_for_the_backward_pass() -> None:
    blocks, kept = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)]), list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with float8.stored(nn.ModuleDict({"blocks": blocks})):
        for layer in blocks:
            layer.requires_grad_(False)
        x = torch.randn(2, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            blocks[2](blocks[1](blocks[0](x))).sum().backward()
        assert x.grad is not None and x.grad.any()
    assert sum(tensor.nbytes for tensor in kept) < 3 * 64 * 64 + 64


def float8_layers(module: nn.Module) -> list[float8.Float8Linear]:
    return [layer for layer in module.modules() if isinstance(layer, float8.Float8Linear)]


@pytest.mark.parametrize("size", [1e-6, 0.02, 1.0, 1e3])
def test_a_weight_is_off_by_a_sixteenth_at_most_whatever_the_size_of_all(size: float) -> None:
    block = nn.Module()
    layer = nn.Linear(64, 32, bias=False)
    block.blocks = nn.ModuleList([layer])
    layer.weight.data.normal_().mul_(size)
    layer.weight.data[3] = 0
    weight = layer.weight.data.clone()
    with float8.stored(block):
        assert isinstance(layer, float8.Float8Linear) and layer.weight.element_size() == 1
        assert torch.equal(float8.whole(layer), weight)
        error = (layer(torch.eye(64)).T - weight).abs()
    assert type(layer) is nn.Linear and torch.equal(layer.weight, weight) and not layer._buffers
    most = float(weight.abs().max())
    assert (error <= weight.abs() / 16 + most * 2.0**-18).all() and error.max() > most / 64


def test_a_matrix_of_zeros_stays_one() -> None:
    block = nn.ModuleList([nn.Linear(4, 4, bias=False)])
    nn.init.zeros_(block[0].weight)
    with float8.stored(nn.ModuleDict({"blocks": block})):
        assert torch.equal(block[0](torch.ones(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("name", list(published.DENOISERS))
def test_most_of_a_transformer_is_stored_and_nothing_that_reads_the_time(name: str) -> None:
    real = published.denoiser(name)
    chosen, names = float8.linears(real), {module: name for name, module in real.named_modules()}
    told = [names[layer] for layer in chosen]
    assert not [name for name in told if "norm" in name or "time" in name or "embed" in name or name == "proj_out"]
    share = sum(layer.weight.numel() for layer in chosen) / sum(p.numel() for p in real.parameters())
    assert share > (0.2 if name in ("SD 1.4", "SD 2.1") else 0.6)  # those convolve more than they multiply
    kept = [f"{name}.weight" for name in told[:3]]
    assert [names[layer] for layer in float8.linears(real, but=kept)] == told[3:]


def test_predictions_of_the_bundled_model_are_off_by_what_docs_memory_says() -> None:
    """Relative L2 errors on the paths of four pictures: of predictions, and of what a concept changes in them."""
    family = family_of(load_pipeline(Path(__file__).parents[1] / "checkpoints/emoji-sd"))
    cond = family.encode(["a cat", "a dog in the mosaic style", "a guitar in the neon style", "a pizza"])
    noise = family.initial_noise([torch.Generator().manual_seed(seed) for seed in range(4)])
    null = family.null()
    path = rollout(family, family.denoiser, noise, cond, null, num_steps=10, guidance_scale=4.0)
    with float8.stored(family.denoiser), torch.no_grad():
        got = [
            predict_many(family, family.denoiser, x, t, [null[[0] * 4], cond])
            for x, t in zip(path.inputs, path.t, strict=True)
        ]
    null_got, cond_got = (torch.stack(predictions) for predictions in zip(*got, strict=True))

    def error(narrow: Tensor, whole: Tensor) -> float:
        return float((narrow - whole).norm() / whole.norm())

    assert path.cond is not None and path.null is not None
    assert error(cond_got, path.cond) == pytest.approx(0.012, rel=0.2)
    assert error(cond_got - null_got, path.cond - path.null) == pytest.approx(0.057, rel=0.2)


def train(family: Any, folder: Path, plan: TrainPlan = THIN) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder.mkdir(exist_ok=True)
    trainer.train(family, plan, folder, Accelerator(cpu=True))
    return checkpoint.load(folder).provenance


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@some
def test_an_adapter_learns_beside_it_and_fits_the_base_as_it_was(name: str, tmp_path: Path) -> None:
    family = make(name)
    before = copy.deepcopy(family.denoiser.state_dict())
    told = train(family, tmp_path / "float8")
    after = family.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    assert not float8_layers(family.denoiser)
    fell = losses(tmp_path / "float8")
    assert sum(fell[-3:]) < 0.8 * sum(fell[:3])
    plain = train(make(name), tmp_path / "plain", dataclasses.replace(THIN, frozen=None, updates=1))
    assert told["fingerprint"] == plain["fingerprint"] and (told["frozen"], plain["frozen"]) == ("float8", None)
    at = point(family)
    with torch.no_grad():
        base = family.predict(family.denoiser, *at)
        with esd.erased(family.pipe, tmp_path / "float8"):
            ours = family.predict(family.denoiser, *at)
        stock = make(name)
        stock.pipe.load_lora_weights(tmp_path / "float8", weight_name=checkpoint.LORA_NAME)
        torch.testing.assert_close(stock.predict(stock.denoiser, *at), ours, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(base, ours, atol=1e-3)


@some
def test_the_teacher_is_the_stored_base_bit_for_bit_while_the_adapter_moves(name: str) -> None:
    family = make(name)
    at = point(family)
    with float8.stored(family.denoiser), torch.no_grad():
        base = family.predict(family.denoiser, *at)
        views = LoraViews(family.denoiser, family.select("esd_x").names, Lora(2, 2.0), seed=0)
        assert torch.equal(family.predict(views.student, *at), base)
        for parameter in views.parameters():
            parameter.add_(torch.randn_like(parameter))
        assert torch.equal(family.predict(views.teacher, *at), base)
        assert not torch.allclose(family.predict(views.student, *at), base)
        views.restore()


def test_the_device_never_holds_the_weights_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = make("flux-dev")
    layers, place, stored = float8.linears(family.denoiser), family.place, list[int]()

    def watched(*parts: Any) -> None:
        if "denoiser" in parts:
            stored.append(len(float8_layers(family.denoiser)))
        place(*parts)

    monkeypatch.setattr(family, "place", watched)
    train(family, tmp_path, dataclasses.replace(THIN, updates=1))
    assert stored == [len(layers)]


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(THIN, updates=4, save_every=3)
    train(make("sd1"), tmp_path / "whole", plan)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
        with pytest.raises(RuntimeError, match="cut off"):
            train(make("sd1"), tmp_path / "parts", plan)
    train(make("sd1"), tmp_path / "parts", plan)
    whole, parts = (checkpoint.load(tmp_path / folder).differences for folder in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_plan_says_how_much_is_stored_and_only_what_is_frozen_can_be() -> None:
    family = make("flux-dev")
    assert f"frozen     {len(float8.linears(family.denoiser))} matrices stored in float8" in describe(family, THIN)
    with pytest.raises(UserError, match="frozen=float8 without an adapter"):
        dataclasses.replace(THIN, lora=None)


def test_one_command_trains_and_draws_with_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = float8.stored
    kept: list[int] = []

    def watched(module: nn.Module, **but: Any) -> Any:
        kept.append(len(but.get("but", ())))
        return stored(module, **but)

    monkeypatch.setattr(float8, "stored", watched)
    ended = train_program(command, "weights=lora", "weights.frozen=float8")
    assert ended.code == 0 and "matrices stored in float8" in ended.out, ended.err
    assert kept == [0, 20]  # trained with none left out, drawn with the selected ones left out
    told = checkpoint.load(command.folder / "runs/cat").provenance
    assert told["frozen"] == "float8"
