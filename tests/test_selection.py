from __future__ import annotations

import pytest
from torch import nn

from esd.families import Family
from esd.selection import Selection, SelectionError, check, resolve
from tests import tiny


@pytest.fixture(scope="module", params=["small", "large"])
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return tiny.pipeline(size=request.param).unet


def select(unet: nn.Module, expression: str) -> Selection:
    from esd.families import StableDiffusion
    from esd.families.unet import parameter_infos

    return resolve(expression, parameter_infos(unet), StableDiffusion.presets, type(unet).__name__)


def module_rule(unet: nn.Module, keep) -> set[str]:
    """Upstream's 2025 way: the parameters of Linear and Conv2d modules whose name fits."""
    names = set()
    for module_name, module in unet.named_modules():
        if type(module).__name__ in ("Linear", "Conv2d", "LoRACompatibleLinear") and keep(module_name):
            names |= {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return names


def parameter_rule(unet: nn.Module, keep) -> set[str]:
    """Upstream's 2023 way: every parameter whose name fits."""
    return {name for name, _ in unet.named_parameters() if keep(name)}


def test_esd_x_is_every_linear_of_cross_attention(unet: nn.Module) -> None:
    assert set(select(unet, "esd_x").names) == module_rule(unet, lambda name: "attn2" in name)


def test_esd_x_strict_is_its_keys_and_values(unet: nn.Module) -> None:
    expected = module_rule(unet, lambda name: "attn2.to_k" in name or "attn2.to_v" in name)
    assert set(select(unet, "esd_x_strict").names) == expected


def test_esd_u_is_every_linear_and_conv_elsewhere(unet: nn.Module) -> None:
    expected = module_rule(unet, lambda name: "attn2" not in name)
    assert set(select(unet, "esd_u").names) == expected
    assert {"conv_in.weight", "conv_out.bias", "time_embedding.linear_1.weight"} <= expected


def test_esd_u_2023_has_norms_but_neither_output_nor_time_embedding(unet: nn.Module) -> None:
    # CompVis: all but `out.*`, `attn2`, `time_embed`; in diffusers' names
    left_out = ("conv_norm_out.", "conv_out.", "attn2", "time_embedding.")
    expected = parameter_rule(unet, lambda name: not any(part in name for part in left_out))
    assert set(select(unet, "esd_u_2023").names) == expected
    assert any("norm" in name for name in expected)


def test_esd_all_is_every_linear_and_conv(unet: nn.Module) -> None:
    expected = module_rule(unet, lambda name: True)
    assert set(select(unet, "esd_all").names) == expected
    assert not any("norm" in name for name in expected)


def test_esd_x_2023_self_attention_and_esd_all_2023(unet: nn.Module) -> None:
    assert set(select(unet, "esd_x_2023").names) == parameter_rule(unet, lambda name: "attn2" in name)
    assert set(select(unet, "self_attention").names) == parameter_rule(unet, lambda name: "attn1" in name)
    everything = select(unet, "esd_all_2023")
    assert everything.names == tuple(name for name, _ in unet.named_parameters())
    assert everything.share == 1.0


def test_esd_x_and_esd_u_share_nothing_and_make_all_linears_and_convs(unet: nn.Module) -> None:
    x, u = set(select(unet, "esd_x").names), set(select(unet, "esd_u").names)
    assert not x & u
    assert x | u == module_rule(unet, lambda name: True)


def test_count_and_share_are_those_of_the_tensors(unet: nn.Module) -> None:
    selection = select(unet, "esd_x")
    parameters = dict(unet.named_parameters())
    assert selection.numel == sum(parameters[name].numel() for name in selection.names)
    assert selection.share == pytest.approx(selection.numel / sum(p.numel() for p in unet.parameters()))
    assert sum(tensors for _, tensors, _ in selection.table) == len(selection.names)
    assert sum(values for _, _, values in selection.table) == selection.numel


@pytest.mark.parametrize(
    ("expression", "same"),
    [
        ("cross.k + cross.v", "esd_x_strict"),
        ("attn2", "cross"),
        ("attn1.q", "name:*attn1.to_q*"),
        ("down[0].self", "name:down_blocks.0.*attn1*"),
        ("down[0:2].resnet", "name:down_blocks.[01].resnets*"),
        ("down.0:2.resnet", "down[0:2].resnet"),
        ("up[1:].cross.v", "up.cross.v - up[0:1]"),
        ("up[:1]", "name:up_blocks.0.*"),
        ("mid", "name:mid_block*"),
        ("out", "name:conv_norm_out* + name:conv_out*"),
        ("cross.out", "name:*attn2.to_out*"),
        ("time", "name:time_embedding*"),
        ("resnet.time", "name:*time_emb_proj*"),
        ("proj.in", "name:*proj_in*"),
        ("ff.out", "name:*ff.net.2*"),
        ("norm", "all - (linear + conv)"),
        ("resnet.shortcut", "name:*conv_shortcut*"),
        ("cross + self & mid", "cross + (self & mid)"),
        ("all - cross - self", "all - (cross + self)"),
        ("cross-mid", "(cross)-(mid)"),
        ("esd_x & up", "up.cross"),
    ],
)
def test_expressions_that_mean_the_same(expression: str, same: str) -> None:
    unet = tiny.pipeline(size="large").unet
    chosen = select(unet, expression)
    assert chosen.names == select(unet, same).names
    assert chosen.names == tuple(n for n, _ in unet.named_parameters() if n in set(chosen.names))


def test_a_typing_mistake_names_its_near_misses(unet: nn.Module) -> None:
    with pytest.raises(SelectionError) as caught:
        select(unet, "cross + attn3")
    message = "selection 'attn3' matched nothing in UNet2DConditionModel; nearest: attn1, attn2"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "expression",
    ["", "cross +", "(cross", "cross)", "+ cross", "cross self", "cross..k", "up[a]", "cross[0]",
     "name:*attn9*",
     "up[7]", "esd_y", "mid.down", "cross - cross", "k.cross", "xyzzy", "& &", "cross,self"],
)  # fmt: skip
def test_what_cannot_be_read_or_matches_nothing_is_an_error(unet: nn.Module, expression: str) -> None:
    with pytest.raises(SelectionError, match="selection"):
        select(unet, expression)


@pytest.mark.parametrize("expression", ["", "cross +", "(cross", "cross)", "cross self", "cross..k", "up[a]", "& &"])
def test_what_no_model_could_read_is_an_error_without_one(expression: str) -> None:
    with pytest.raises(SelectionError, match="cannot be read"):
        check(expression)


@pytest.mark.parametrize("expression", ["esd_x", "(cross.k + up[0:2].self.v) & linear", "down.0:2.self - name:*.to_?*"])
def test_what_some_model_could_read_is_none(expression: str) -> None:
    check(expression)


def test_a_range_beyond_the_model_says_what_there_is() -> None:
    with pytest.raises(SelectionError, match=r"up\[0:3\]"):
        select(tiny.pipeline(size="large").unet, "up[5].cross")


def test_a_preset_may_be_a_predicate(tiny_family: Family) -> None:
    infos = tiny_family.parameter_infos()
    chosen = resolve("biases - mid", infos, {"biases": lambda info: info.name.endswith("bias")}, "UNet")
    assert chosen.names
    assert all(name.endswith("bias") and not name.startswith("mid") for name in chosen.names)


def test_describe_has_a_summary_and_a_line_for_each_part(tiny_family: Family) -> None:
    first, *rest = tiny_family.select("esd_x").describe().splitlines()
    assert first.startswith("esd_x: 20 tensors, 2,216 values, 4.3% of UNet2DConditionModel")
    assert [line.split()[0] for line in rest] == ["down.cross", "up.cross", "mid.cross"]
