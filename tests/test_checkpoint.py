from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import esd
from esd.checkpoint import CheckpointError, export_official, fingerprint, load, save
from esd.families import family_of
from esd.weights import WeightViews
from tests import tiny


def train_and_save(path: Path, pipe: Any = None, expression: str = "esd_x") -> Any:
    """Moves the selected weights of a tiny pipeline, saves the differences, and returns the moved UNet."""
    pipe = pipe or tiny.pipeline()
    family = family_of(pipe)
    views = WeightViews(pipe.unet, family.select(expression).names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in views.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    provenance = {
        "base": "tiny/sd",
        "fingerprint": fingerprint(views.base),
        "concepts": ["cät 'x'/\n"],
    }
    save(path, views.differences(), provenance)
    return pipe.unet


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "erased.safetensors"
    train_and_save(path)
    return path


def state(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def assert_state(pipe: Any, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def assert_refused(pipe: Any, path: Path, message: str) -> None:
    """Refused with that message, in one line, and nothing changed."""
    before = state(pipe)
    with pytest.raises(CheckpointError, match=message) as caught:
        esd.apply(pipe, path)
    assert "\n" not in str(caught.value)
    assert_state(pipe, before)


def rewrite(path: Path, change: Any) -> None:
    """Rewrites a checkpoint through `save` after `change(differences, provenance)`."""
    old = load(path)
    change(old.differences, old.provenance)
    save(path, old.differences, old.provenance)


def test_differences_that_are_not_finite_are_not_published(file: Path) -> None:
    before = file.read_bytes()

    def spoil(differences: dict[str, torch.Tensor], provenance: Any) -> None:
        next(iter(differences.values())).view(-1)[0] = float("nan")

    with pytest.raises(ValueError, match="not finite"):
        rewrite(file, spoil)
    assert file.read_bytes() == before


def test_an_adapter_put_on_afterwards_is_named_and_the_originals_are_kept(file: Path) -> None:
    pipe = tiny.pipeline()
    base = state(pipe)
    esd.apply(pipe, file)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    plain = block.to_k
    block.to_k = torch.nn.ModuleDict({"base_layer": plain})  # what peft does to a name
    worn = state(pipe)
    with pytest.raises(CheckpointError, match="unload adapters first"):
        esd.remove(pipe)
    assert_state(pipe, worn)
    block.to_k = plain
    esd.remove(pipe)
    assert_state(pipe, base)


@pytest.mark.parametrize("expression", ["esd_x", "esd_u", "up.self"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_applying_makes_the_base_the_trained_student(tmp_path: Path, expression: str, size: Any) -> None:
    student = train_and_save(tmp_path / "erased.safetensors", tiny.pipeline(size=size), expression)
    pipe = tiny.pipeline(size=size)
    base = state(pipe)
    esd.apply(pipe, tmp_path)  # a run directory will do
    moved = 0
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(pipe.unet.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)
        moved += not torch.equal(tensor, base[name])
    assert moved == len(load(tmp_path).differences)


def test_removing_restores_bit_for_bit(file: Path) -> None:
    pipe = tiny.pipeline()
    before = state(pipe)
    for _ in range(2):
        esd.apply(pipe, file)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
        esd.remove(pipe)
        assert_state(pipe, before)


def test_the_context_manager_takes_them_off_on_any_exit(file: Path) -> None:
    pipe = tiny.pipeline()
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt), esd.erased(pipe, file) as worn:
        assert worn is pipe
        assert not torch.equal(
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight,
            before["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"],
        )
        raise KeyboardInterrupt
    assert_state(pipe, before)


def test_two_pipelines_do_not_mix(file: Path) -> None:
    one, other = tiny.pipeline(), tiny.pipeline()
    esd.apply(one, file)
    before = state(other)
    with pytest.raises(CheckpointError, match="wears no"):
        esd.remove(other)
    assert_state(other, before)
    esd.apply(other, file)
    assert_state(other, state(one))


def test_applying_twice_is_refused(file: Path) -> None:
    pipe = tiny.pipeline()
    esd.apply(pipe, file)
    assert_refused(pipe, file, "already wears")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_base_in_half_precision_is_accepted(file: Path, dtype: torch.dtype) -> None:
    pipe = tiny.pipeline().to(dtype)
    before = state(pipe)
    esd.apply(pipe, file)
    assert pipe.unet.dtype == dtype
    assert any(not torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    esd.remove(pipe)
    assert_state(pipe, before)


@pytest.mark.parametrize("trained", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("used", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_trained_in_half_precision_fits_every_copy(tmp_path: Path, trained: Any, used: Any) -> None:
    train_and_save(tmp_path / "erased.safetensors", tiny.pipeline().to(trained))
    esd.apply(tiny.pipeline().to(used), tmp_path)
    esd.apply(tiny.pipeline().to(trained).to(used), tmp_path)  # rounded twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fine_tune_of_the_base_is_refused(file: Path, dtype: torch.dtype) -> None:
    pipe = tiny.pipeline()
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter += 3e-3 * parameter.std() * torch.randn_like(parameter)
    assert_refused(pipe.to(dtype), file, "another base.*tiny/sd")


def test_another_model_of_the_same_architecture_is_refused(file: Path) -> None:
    assert_refused(tiny.pipeline(seed=1), file, "another base")


def test_another_architecture_is_refused(file: Path, tmp_path: Path) -> None:
    assert_refused(tiny.pipeline(size="large"), file, "shape|does not have")
    train_and_save(tmp_path / "large.safetensors", tiny.pipeline(size="large"))
    assert_refused(tiny.pipeline(), tmp_path / "large.safetensors", "does not have|shape")


def test_unknown_keys_are_refused(file: Path) -> None:
    def rename(differences: dict, provenance: dict) -> None:
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        differences[f"unet.{name}"] = differences.pop(name)
        provenance["fingerprint"][f"unet.{name}"] = provenance["fingerprint"].pop(name)

    rewrite(file, rename)
    assert_refused(tiny.pipeline(), file, "does not have; use the base it was made from: tiny/sd")


def test_a_pipeline_that_wears_an_adapter_is_told_to_unload_it(file: Path) -> None:
    pipe = tiny.pipeline()
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    block.to_k = torch.nn.ModuleDict({"base_layer": block.to_k})
    assert_refused(pipe, file, "unload adapters first")


def test_stock_loading_reports_every_name_and_changes_nothing(file: Path) -> None:
    pipe, stored = tiny.pipeline(), load_file(file)
    before = state(pipe)
    assert set(pipe.unet.load_state_dict(stored, strict=False).unexpected_keys) == set(stored)
    assert_state(pipe, before)


def test_wrong_shapes_are_refused(file: Path) -> None:
    def transpose(differences: dict, provenance: dict) -> None:
        name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        differences[name] = differences[name][:, :3]

    rewrite(file, transpose)
    assert_refused(tiny.pipeline(), file, r"shape \(16, 3\), the model's is \(16, 16\)")


def test_a_damaged_file_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    flipped = bytearray(whole)
    flipped[-5] ^= 16
    for content, message in (
        (whole[:-10], "cannot be read"),
        (whole[:40], "cannot be read"),
        (b"", "cannot be read"),
        (b"not a checkpoint at all", "cannot be read"),
        (bytes(flipped), "damaged"),
    ):
        damaged.write_bytes(content)
        assert_refused(tiny.pipeline(), damaged, message)


def edited(path: Path, change: Any, sign: bool) -> None:
    """Puts `change(provenance)` into a checkpoint's header; `sign` makes the checksum that of the new header."""
    with safe_open(path, framework="pt") as handle:
        header = dict(handle.metadata())
    tensors = load_file(path)
    header["provenance"] = json.dumps(change(json.loads(header["provenance"])))
    if sign:
        header["sha256"] = esd.checkpoint._digest(tensors, header)
    save_file(tensors, path, metadata=header)


def test_an_edited_provenance_is_damage(file: Path) -> None:
    edited(file, lambda told: told | {"base": "another/base"}, sign=False)
    assert_refused(tiny.pipeline(), file, "damaged")


@pytest.mark.parametrize(
    "fingerprint",
    [
        None,
        [],
        ["conv_in.weight"],
        {},
        {"conv_in.weight": None},
        {"conv_in.weight": {"dtype": "float32"}},
        {"conv_in.weight": {"dtype": "float32", "values": "?"}},
        {"conv_in.weight": {"dtype": "nn", "values": ""}},
        {"conv_in.weight": {"dtype": 3, "values": ""}},
    ],
    ids=str,
)
def test_an_odd_fingerprint_is_refused(file: Path, fingerprint: Any) -> None:
    edited(file, lambda told: told | {"fingerprint": fingerprint}, sign=True)
    assert_refused(tiny.pipeline(), file, "not what esd.train writes")


@pytest.mark.parametrize("provenance", [[], None, 3, "text", {}], ids=str)
def test_an_odd_provenance_is_refused(file: Path, provenance: Any) -> None:
    edited(file, lambda told: provenance, sign=True)
    assert_refused(tiny.pipeline(), file, "not what esd.train writes")


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    save_file(tiny.pipeline().unet.state_dict(), tmp_path / "erased.safetensors", metadata={"format": "pt"})
    assert_refused(tiny.pipeline(), tmp_path, "format 'pt'")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert_refused(tiny.pipeline(), tmp_path / "none.safetensors", "none.safetensors")
    assert_refused(tiny.pipeline(), tmp_path, "erased.safetensors")


def test_what_was_saved_comes_back(file: Path) -> None:
    loaded = load(file)
    assert loaded.provenance["concepts"] == ["cät 'x'/\n"]
    assert all(d.dtype == torch.float32 for d in loaded.differences.values())
    assert set(loaded.provenance["fingerprint"]) == set(loaded.differences)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata()["format"] == "esd-difference-v1"
        assert json.loads(handle.metadata()["provenance"]) == loaded.provenance


def test_checking_changes_nothing_and_refuses_what_applying_would(file: Path) -> None:
    pipe, found = tiny.pipeline(), load(file)
    before = state(pipe)
    esd.checkpoint.check(pipe, file)
    esd.checkpoint.check(pipe, found)
    assert_state(pipe, before)
    with pytest.raises(CheckpointError, match="another base"):
        esd.checkpoint.check(tiny.pipeline(seed=1), found)


def test_a_checkpoint_that_is_loaded_is_not_read_again(file: Path) -> None:
    pipe, found = tiny.pipeline(), load(file)
    before = state(pipe)
    file.unlink()
    with esd.erased(pipe, found):
        assert any(not torch.equal(value, before[name]) for name, value in state(pipe).items())
    assert_state(pipe, before)


def test_a_failed_save_leaves_the_old_file_and_no_rest(file: Path, monkeypatch: Any) -> None:
    before = file.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    loaded = load(file)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save(file, loaded.differences, loaded.provenance)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_checkpoint_without_its_fingerprint_is_not_written(file: Path) -> None:
    loaded = load(file)
    with pytest.raises(ValueError, match="fingerprint"):
        save(file, loaded.differences, {})
    with pytest.raises(ValueError, match="differences"):
        save(file, {}, {"fingerprint": {}})


def test_a_fingerprint_is_small_and_sees_every_tensor() -> None:
    tensors = {"a": torch.randn(100, 100), "b": torch.randn(3), "c": torch.randn(1, 1).bfloat16()}
    prints = fingerprint(tensors)
    assert len(json.dumps(prints)) < 600
    changed = copy.deepcopy(tensors)
    changed["b"][1] += 1e-6
    assert [name for name in tensors if prints[name] != fingerprint(changed)[name]] == ["b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_official_export_loads_with_stock_tools(file: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    out = tmp_path / "official.safetensors"
    export_official(file, tiny.pipeline().to(dtype), out)
    stock, ours = tiny.pipeline().to(dtype), tiny.pipeline().to(dtype)
    weights = load_file(out)
    assert not stock.unet.load_state_dict(weights, strict=False).unexpected_keys
    assert set(weights) == set(load(file).differences)
    esd.apply(ours, file)
    assert_state(stock, state(ours))
    with pytest.raises(CheckpointError, match="already wears"):
        export_official(file, ours, out)


def test_importing_esd_loads_nothing_heavy() -> None:
    heavy = "sorted({'torch', 'diffusers', 'hydra'} & set(sys.modules))"
    code = f"import sys, esd; print({heavy}, esd.apply.__name__)"
    root = Path(__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root) == "[] apply\n"


def test_unknown_names_of_the_package_are_an_error() -> None:
    with pytest.raises(AttributeError, match="aply"):
        esd.aply  # noqa: B018
