"""An adapter beside the weights: the base never moves, the stock loader draws what was trained, on every family."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import esd
from esd import checkpoint, lora, trainer
from esd.description import describe
from esd.errors import UserError
from esd.families import family_of
from esd.lora import Lora, LoraViews, LowRank
from tests import tiny
from tests.families import GUIDANCE, every, shared
from tests.plans import PLAN, SAMPLING

PROMPT = "a cat"
THIN = dataclasses.replace(
    PLAN, lora=Lora(3, 6.0), selection="esd_all", updates=3, batch_size=4, lr=2e-2, rollouts=2, reuse=8
)


def train(family: Any, folder: Path, **changes: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    if hasattr(family, "max_tokens"):
        family.max_tokens = tiny.TOKENS
    trainer.train(family, dataclasses.replace(THIN, **changes), folder, Accelerator(cpu=True))


def drawn(pipe: Any, guidance: float) -> Tensor:
    """A picture by the stock pipeline, (3, h, w)."""
    few = {"max_sequence_length": tiny.TOKENS} if hasattr(pipe, "transformer") else {}
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt=PROMPT, num_inference_steps=3, guidance_scale=guidance, generator=generator, height=16, width=16,
        output_type="pt", **few,
    ).images[0]  # fmt: skip


@every
def test_the_stock_loader_draws_what_our_checkpoint_draws(name: str, tmp_path: Path) -> None:
    family, guidance = family_of(tiny.every(name)), GUIDANCE[name]
    before = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    base = drawn(family.pipe, guidance)
    train(family, tmp_path, sampling=dataclasses.replace(SAMPLING, guidance_scale=guidance))
    after = family.denoiser.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    with esd.erased(family.pipe, tmp_path):
        ours = drawn(family.pipe, guidance)
    stock = tiny.every(name)
    stock.load_lora_weights(tmp_path, weight_name=checkpoint.LORA_NAME)
    torch.testing.assert_close(drawn(stock, guidance), ours, atol=2e-4, rtol=1e-3)
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(drawn(family.pipe, guidance), base)


def test_the_teacher_is_the_base_bit_for_bit_while_the_adapter_moves() -> None:
    family = family_of(tiny.pipeline())
    x, t = torch.randn(2, *family.sample_shape), torch.tensor([300.0, 900.0])
    cond = family.encode([PROMPT, "a dog"])
    required = {name: p.requires_grad for name, p in family.denoiser.named_parameters()}
    with torch.no_grad():
        base = family.predict(family.denoiser, x, t, cond)
        views = LoraViews(family.denoiser, family.select("esd_x").names, Lora(2, 2.0), seed=0)
        assert torch.equal(family.predict(views.student, x, t, cond), base)  # B begins at zero
        for parameter in views.parameters():
            parameter.add_(torch.randn_like(parameter))
        assert torch.equal(family.predict(views.teacher, x, t, cond), base)
        assert (family.predict(views.student, x, t, cond) - base).abs().max() > 1e-3
    family.predict(views.student, x, t, cond).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in views.parameters())
    trainable = {name for name, p in family.denoiser.named_parameters() if p.requires_grad}
    assert len(trainable) == len(views.parameters()) and all(".lora_" in name for name in trainable)
    views.restore()
    assert {name: p.requires_grad for name, p in family.denoiser.named_parameters()} == required
    with torch.no_grad():
        assert torch.equal(family.predict(family.denoiser, x, t, cond), base)


def test_factors_multiply_out_to_what_peft_adds() -> None:
    family = family_of(tiny.pipeline())
    views = LoraViews(family.denoiser, family.select("esd_all").names, Lora(2, 5.0), seed=0)
    with torch.no_grad():
        for parameter in views.parameters():
            parameter.normal_()
    differences, layers = views.differences(), dict(family.denoiser.named_modules())
    kinds = set()
    for name in differences:
        layer = layers[name.removesuffix(".weight")]
        kinds.add(type(layer.base_layer))
        torch.testing.assert_close(differences[name], layer.get_delta_weight("esd"))
    assert kinds >= {nn.Linear, nn.Conv2d}
    whole = torch.stack([difference.square().sum() for difference in differences.values()]).sum().sqrt()
    assert views.pull(0.0) == pytest.approx(float(whole), rel=1e-5)
    assert views.pull(0.25) == pytest.approx(0.75 * float(whole), rel=1e-5)
    views.restore()


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    train(family_of(tiny.pipeline()), tmp_path / "whole", save_every=2)
    publish = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("cut off")))
    with pytest.raises(RuntimeError, match="cut off"):
        train(family_of(tiny.pipeline()), tmp_path / "parts", save_every=2)
    monkeypatch.setattr(checkpoint, "save", publish)
    train(family_of(tiny.pipeline()), tmp_path / "parts", save_every=2)
    whole, parts = (checkpoint.load(tmp_path / folder).differences for folder in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_the_file_holds_factors_and_says_which_base(tmp_path: Path) -> None:
    family = family_of(tiny.pipeline())
    train(family, tmp_path, selection="esd_x")
    loaded = checkpoint.load(tmp_path)
    assert isinstance(loaded.differences, LowRank) and loaded.differences.lora == Lora(3, 6.0)
    assert loaded.provenance["lora"] == {"rank": 3, "alpha": 6.0}
    values = sum(factor.numel() for pair in loaded.differences.factors.values() for factor in pair)
    assert loaded.provenance["parameters"] == values == lora.size(family.denoiser, loaded.differences, 3)
    assert (tmp_path / checkpoint.FILE_NAME).stat().st_size < 40_000 + 4 * values
    other = tiny.pipeline(seed=1)
    with pytest.raises(checkpoint.CheckpointError, match="another base"):
        esd.apply(other, tmp_path)


def test_the_plan_says_what_an_adapter_trains_and_what_it_cannot() -> None:
    family = family_of(tiny.pipeline())
    told = describe(family, dataclasses.replace(THIN, selection="cross"))
    assert "LoRA of rank 3, alpha 6" in told and "biases, norms and embeddings stay" in told
    with pytest.raises(UserError, match="weights=lora: the selection holds no linear or convolution weight"):
        describe(family, dataclasses.replace(THIN, selection="name:*norm*"))


def test_a_rank_that_no_matrix_has_is_told() -> None:
    family = family_of(tiny.pipeline())
    most = max(min(w.shape[0], w[0].numel()) for name, w in family.denoiser.named_parameters() if "to_k.weight" in name)
    for rank in (most, most + 1):
        told = describe(family, dataclasses.replace(THIN, selection="cross.k", lora=Lora(rank, 1.0)))
        assert (f"no change to these matrices has a rank above {most}" in told) == (rank > most)


def test_a_model_that_takes_no_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="diffusers puts no adapters on PixArtTransformer2DModel; set weights=full"):
        describe(shared("pixart"), THIN)


def test_a_model_that_wears_an_adapter_is_refused() -> None:
    family = family_of(tiny.pipeline())
    views = LoraViews(family.denoiser, family.select("esd_x").names, Lora(2, 2.0), seed=0)
    with pytest.raises(UserError, match="wears an adapter already"):
        LoraViews(family.denoiser, views.names, Lora(2, 2.0), seed=0)
    views.restore()
