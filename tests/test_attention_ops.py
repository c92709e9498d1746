"""Attention is seen without changing a bit, and edited as prompt-to-prompt's formulas say, on every family."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from esd.errors import UserError
from esd.interventions import (
    Attention,
    AttentionEdit,
    AttentionMaps,
    AttentionOp,
    Call,
    Guide,
    LocalBlend,
    Record,
    Reweight,
    Skip,
    Source,
    attach,
    positions_of,
    resolve,
    token_texts,
)
from esd.interventions.sites import is_attention
from esd.interventions.words import aligned, alignment
from tests import families, tiny
from tests.families import TEXT, UNETS, close, every, make, shared

WHOLE = TEXT | dict.fromkeys(UNETS, "cross + self")
A, B = "a cat in the photo", "the dog in a rose"
drawn = partial(families.drawn, prompts=[A])


class Recompute(AttentionOp):
    """Gives back the probabilities that there are, so that they are multiplied with values here."""

    def attend(self, call: Call, attention: Attention) -> Tensor:
        return attention.probabilities(call.positions)


@every
@pytest.mark.parametrize("most", [2**26, 1])
def test_probabilities_times_values_are_the_layers_output(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd.interventions.probabilities._MOST", most)  # 1: head by head
    where = "all - in - out - time" if name == "sdxl" else "joint + self" if name == "sd3.5" else WHOLE[name]
    found = {site.path for site in resolve(shared(name), where, kind=is_attention)}
    assert found == {path for path, module in shared(name).denoiser.named_modules() if is_attention(module)}
    plain, again = Record(where), Record(where)
    drawn(name, plain)
    latents = drawn(name, Recompute(where, on="both"), again)
    assert close(latents, drawn(name))
    pairs = [(kept, again.recording.values[key]) for key, kept in plain.recording.values.items()]
    assert pairs and all(close(*pair) for pair in pairs)


@every
def test_looking_changes_no_bit_and_maps_of_all_tokens_add_up(name: str) -> None:
    maps, apart = AttentionMaps(TEXT[name]), AttentionMaps(TEXT[name], by_place=True, steps=(1, 3))
    assert torch.equal(drawn(name, maps, apart, prompts=(A, B)), drawn(name, prompts=(A, B)))
    rows, tokens, height, width = maps.maps.mean().shape
    texts = token_texts(shared(name), A)
    assert (rows, tokens) == (2, len(texts)) and height == width >= 4
    mass = maps.maps.mean().sum(1)
    assert torch.allclose(mass, torch.ones(())) if name in UNETS else bool(((mass > 0.1) & (mass < 0.9)).all())
    assert maps.maps.steps == [0, 1, 2] and apart.maps.steps == [1, 2]
    assert maps.maps.by_step().shape == (3, rows, tokens, height, width)
    sites = resolve(shared(name), TEXT[name], kind=is_attention)
    assert apart.maps.places == [site.label for site in sites]
    same = [apart.maps.mean(step=1, place=place) for place in apart.maps.places]
    brief, heads = AttentionMaps(TEXT[name], by_step=False), AttentionMaps(TEXT[name], by_step=False, by_head=True)
    drawn(name, brief, heads, prompts=(A, B))
    each = [heads.maps.mean(head=head) for head in heads.maps.heads]
    assert len(each) > 1 and not close(each[0], each[1]) and not brief.maps.heads
    assert close(torch.stack(each).mean(0), brief.maps.mean())
    assert not brief.maps.steps and close(brief.maps.mean(), maps.maps.mean())
    if len({one.shape for one in same}) == 1:
        assert close(torch.stack(same).mean(0), maps.maps.mean(step=1))


@every
def test_attention_of_itself_changes_nothing(name: str) -> None:
    both: Any = {"cross_replace_steps": 1.0, "self_replace_steps": 1.0}
    for op in (
        AttentionEdit(WHOLE[name], source=Source(A, 0), **both),
        AttentionEdit(WHOLE[name], source=Source(A, 0), how="refine", **both),
    ):
        assert close(drawn(name, op), drawn(name)), op
    twice, half = (Reweight(TEXT[name], weights={"cat": w, "the photo": 1 / w}) for w in (2.0, 0.5))
    assert close(drawn(name, twice, half), drawn(name))


@every
def test_another_attention_draws_something_else(name: str) -> None:
    plain = drawn(name)
    full = drawn(name, AttentionEdit(TEXT[name], source=Source(B, 0), cross_replace_steps=1.0))
    part = drawn(name, AttentionEdit(TEXT[name], source=Source(B, 0), cross_replace_steps=0.4))
    word = drawn(
        name,
        AttentionEdit(TEXT[name], source=Source(B, 0), cross_replace_steps=(0, 0), word_steps={"cat": (0, 2)}),
    )
    more = drawn(name, Reweight(TEXT[name], weights={"cat": 5.0}))
    found = [plain, full, part, word, more]
    assert not any(close(one, other) for i, one in enumerate(found) for other in found[:i])


def test_attention_is_the_sources_where_words_are_replaced() -> None:
    """Both prompts' maps in one run: the target's are the source's times M."""
    family = shared("sd1")
    edit = AttentionEdit("cross", source=0, rows=(1,), cross_replace_steps=1.0)
    maps = AttentionMaps("cross", steps=(0, 1), by_place=True)
    drawn("sd1", edit, maps, prompts=("a cat", "a zebra"))
    place = maps.maps.places[0]  # later ones get other queries
    source, target = maps.maps.mean(place=place)
    matrix = aligned(family, "a cat", "a zebra", "replace").matrix
    assert torch.allclose(target, torch.einsum("shw,st->thw", source, matrix), atol=1e-6)
    assert not torch.allclose(target, source, atol=1e-3)
    (cat,), zebra = positions_of(family, "a cat", "cat"), positions_of(family, "a zebra", "zebra")
    assert len(zebra) == 5 and torch.allclose(target[zebra], source[cat].expand(5, -1, -1) / 5, atol=1e-6)


def test_self_attention_of_large_maps_is_left() -> None:
    some: Any = {"source": Source(B, 0), "self_replace_steps": 1.0}
    sizes = (
        drawn("sd2-v", AttentionEdit("self", **some, self_tokens=64)),
        drawn("sd2-v", AttentionEdit("self", **some, self_tokens=256)),
    )
    with pytest.raises(UserError, match=r"self_tokens=1\): .* has 16 image tokens or more.* allowed: from 16"):
        drawn("sd2-v", AttentionEdit("self", **some, self_tokens=1))
    with pytest.raises(UserError, match=r"self_tokens=1\): .* allowed: from 16"):
        drawn("sd2-v", AttentionEdit("cross + self", **some, self_tokens=1))
    with pytest.raises(UserError, match=r"self_tokens=1\): .* so that none is replaced"):
        drawn("sd3", AttentionEdit(TEXT["sd3"], **some, self_tokens=1))
    assert not close(*sizes) and not close(sizes[0], drawn("sd2-v"))


@every
@pytest.mark.parametrize("how", ["replace", "refine"])
def test_an_alignment_loses_no_attention(name: str, how: Any) -> None:
    source, target = ("a cat in style", "a zebra in style") if how == "replace" else ("cat in", "the cat in a rose")
    found = aligned(shared(name), source, target, how)
    texts = [token_texts(shared(name), prompt) for prompt in (source, target)]
    assert found.matrix.shape == (len(texts[0]), len(texts[1])) and found.known.shape == (len(texts[1]),)
    special = torch.tensor([text == "" for text in texts[0]])
    assert torch.allclose(found.matrix.sum(1)[special], torch.ones(()))
    if how == "replace":
        assert torch.allclose(found.matrix.sum(1), torch.ones(())) and bool((found.known == 1).all())
    else:
        new = positions_of(shared(name), target, "rose")
        assert not found.known[new].any() and found.known[positions_of(shared(name), target, "cat")].all()
    (same,) = {aligned(shared(name), text, text, how).matrix.equal(torch.eye(len(texts[0]))) for text in (source,)}
    assert same


def test_equal_words_are_aligned_in_order() -> None:
    assert alignment(["a", "b", "and", "a", "c"], ["a", "c", "and", "a", "b"]) == [(0, 0), (2, 2), (3, 3)]
    assert alignment(["b"], ["a"]) == [] and alignment(["a"], ["b", "a"]) == [(0, 1)]


@every
def test_words_are_found_where_the_encoder_reads_them(name: str) -> None:
    family = shared(name)
    prompt = "the zebra in A rose, a rose"
    texts = token_texts(family, prompt)
    assert len(texts) == family.encode([prompt]).tensors["encoder_hidden_states"].shape[1]
    spelled = "".join(texts[i] for i in positions_of(family, prompt, "zebra")).replace("\u2581", "")
    assert spelled.startswith("z") and spelled.endswith("a")
    twice = positions_of(family, prompt, "a rose")
    assert {i for word in ("a", "rose") for i in positions_of(family, prompt, word)} == set(twice)
    with pytest.raises(UserError, match=r"'ros' is not in the prompt .* its words: the, zebra, in, a, rose"):
        positions_of(family, prompt, "ros")


def test_a_word_past_what_is_read_is_refused() -> None:
    with pytest.raises(UserError, match="no longer read"):
        positions_of(shared("sd1"), "xylophones xylophones cat", "cat")


class Broken(AttentionOp):
    """Fails in the middle of an attention."""

    def attend(self, call: Call, attention: Attention) -> None:
        raise ZeroDivisionError


@every
def test_nothing_is_left_behind_by_an_exception_inside_an_attention(name: str) -> None:
    family = make(name)
    plain = drawn(name, family=family)
    with attach(family, Recompute(TEXT[name])) as hooks:
        site = resolve(family, TEXT[name], kind=is_attention)[0]
        inside = next(module for module in site.module.modules() if isinstance(module, nn.Linear))
        handle = inside.register_forward_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            family.pipe(prompt=A, num_inference_steps=1, output_type="latent", **_length(name))
        handle.remove()
        assert hooks.attention._site is None
    with pytest.raises(ZeroDivisionError):
        drawn(name, Broken(TEXT[name]), family=family)
    assert torch.overrides._len_torch_function_stack() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in family.denoiser.modules())
    assert torch.equal(drawn(name, family=family), plain)


def test_attention_that_does_not_come_by_is_an_error() -> None:
    family = make("sd1")
    family.denoiser.set_attn_processor(AttnProcessor())
    with pytest.raises(UserError, match=r"called torch's scaled_dot_product_attention 0 times.*set_default_attn"):
        drawn("sd1", AttentionMaps("cross"), family=family)
    drawn("sd1", Skip("cross"), family=family)  # nobody listens


@pytest.mark.parametrize("name", ["sd1", "flux-dev", "sd3.5"])
def test_gradients_flow_through_edited_attention_and_are_the_same_under_checkpointing(name: str) -> None:
    family = make(name)
    family.denoiser.requires_grad_(True).train()
    noise, cond = family.initial_noise([torch.Generator().manual_seed(0)]), family.encode([A])
    gradients = []
    for on in (False, True):
        family.denoiser.zero_grad()
        (family.denoiser.enable_gradient_checkpointing if on else family.denoiser.disable_gradient_checkpointing)()
        with attach(family, Reweight(TEXT[name], weights={"cat": 9.0}), prompts=[A]):
            family.predict(family.denoiser, noise, torch.tensor(500.0), cond).square().mean().backward()
        gradients.append([p.grad.clone() for p in family.denoiser.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_masks_causal_and_grouped_attention_are_as_torch_has_them() -> None:
    from esd.interventions.probabilities import Interception, Layout

    def listener(attention: Attention) -> None:
        attention.put([0, 1], attention.probabilities([0, 1]))

    q, k, v = (torch.randn(2, heads, 6, 4, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    q, grouped = q.double().float(), {"enable_gqa": True}
    seen = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    for how in (
        {"attn_mask": seen | torch.eye(6, dtype=torch.bool)}, {"attn_mask": seen[0, 0].float()}, {"is_causal": True},
        {"scale": 0.3},
    ):  # fmt: skip
        expected = nn.functional.scaled_dot_product_attention(q, k, v, **how, **grouped)
        mode = Interception()
        mode.expect("here", lambda queries, keys: Layout.of(queries, keys, None, True, (2, 3)), listener)
        found = nn.functional.scaled_dot_product_attention(q, k, v, **how, **grouped)
        mode.settle()
        assert found is not expected and torch.allclose(found, expected, atol=1e-6)


def _length(name: str) -> dict[str, int]:
    return {} if name in UNETS else {"max_sequence_length": tiny.TOKENS}


BAD: dict[str, Any] = {
    "reads no text": lambda: AttentionMaps("self"),
    "an attention as a whole": lambda: AttentionMaps("ff"),
    "allowed: cond, uncond": lambda: AttentionMaps("cross", on="both"),
    "has maps of 8, 4; allowed: one of these": lambda: AttentionMaps("cross", resolution=77),
    "no site is given": lambda: AttentionMaps([]),
    "is no attention": lambda: Recompute(resolve(shared("sd1"), "ff")),
    r"Reweight\(weights\['cat'\]=nan": lambda: Reweight("cross", weights={"cat": float("nan")}),
    r"cross_replace_steps=.* holds none of the 3": lambda: AttentionEdit(
        "cross", source=Source(B, 0), cross_replace_steps=0.1
    ),
    r"cross_replace_steps=\(7, 9\) reaches beyond": lambda: AttentionEdit(
        "cross", source=Source(B, 0), cross_replace_steps=(7, 9)
    ),
    r"word_steps\['cat'\]=\(7, 9\) reaches": lambda: AttentionEdit(
        "cross", source=Source(B, 0), word_steps={"cat": (7, 9)}
    ),
    "cross_replace_steps=nan": lambda: AttentionEdit("cross", source=Source(B, 0), cross_replace_steps=float("nan")),
    "'horse' is not in the prompt": lambda: AttentionEdit(
        "cross", source=Source(B, 0), word_steps={"horse": 0.5}, steps=(2, 3)
    ),
    "max_gib=1e-09": lambda: AttentionMaps("cross", max_gib=1e-9),
    "give self_replace_steps": lambda: AttentionEdit("cross + self", source=Source(B, 0)),
    "names no self-attention": lambda: AttentionEdit("cross", source=Source(B, 0), self_replace_steps=0.5),
    "stays as it is": lambda: AttentionEdit("cross", source=Source(B, 0), cross_replace_steps=0.0),
    "allowed: replace, refine": lambda: AttentionEdit("cross", source=Source(B, 0), how="both"),  # type: ignore[arg-type]
    "cross_replace_steps=1.2": lambda: AttentionEdit("cross", source=Source(B, 0), cross_replace_steps=1.2),
    "has 5 words, 'a cat' has 2|has 2 words": lambda: AttentionEdit("cross", source=Source("a cat", 0)),
    "share no word": lambda: AttentionEdit("cross", source=Source("of", 0), how="refine"),
    "is not in the prompt": lambda: Reweight("cross", weights={"dog": 2.0}),
    "changes nothing; give others": lambda: Reweight("cross", weights={}),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_work_is_refused_in_words(message: str) -> None:
    with pytest.raises(UserError, match=message):
        drawn("sd1", BAD[message]())


AHEAD: dict[str, Any] = {  # what only a sampling tells, not the op nor the model
    "resolution=77": lambda: AttentionMaps("cross", resolution=77),
    "is not in the prompt": lambda: Reweight("cross", weights={"dog": 2.0}),
    "has 2 words": lambda: AttentionEdit("cross", source=Source("a cat", 0), cross_replace_steps=(1, 3)),
    "holds none": lambda: AttentionEdit("cross", source=Source(B, 0), cross_replace_steps=0.1),
    "none of the words horse": lambda: LocalBlend("cross", source=Source(B, 0), words=["horse"]),
    "LocalBlend.*has maps of": lambda: LocalBlend("cross", source=Source(B, 0), words=["cat", "dog"], resolution=77),
}


@pytest.mark.parametrize("message", AHEAD)
def test_what_fits_no_sampling_is_refused_before_it_begins(message: str) -> None:
    family, calls = shared("sd1"), list[int]()
    handle = family.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=message) as told:
        drawn("sd1", AHEAD[message]())
    handle.remove()
    assert not calls and len(str(told.value)) < 300


def test_a_long_expression_does_not_fill_the_message() -> None:
    where = " + ".join(site.expression for site in resolve(shared("sd1"), "cross", kind=is_attention))
    for op in (AttentionMaps(where, max_gib=1e-9), AttentionMaps(where, resolution=77)):
        with pytest.raises(UserError) as told:
            drawn("sd1", op)
        assert len(where) > 150 and len(str(told.value)) < 280


@every
def test_the_size_of_maps_is_known_before(name: str) -> None:
    """Of every place, at two sizes of picture; under a stock pipeline as under `sample`."""
    family = shared(name)
    seen: dict[str, set[tuple[tuple[int, int], tuple[int, int]]]] = {}

    class Grids(AttentionOp):
        def attend(self, call: Call, attention: Attention) -> None:
            grids = call.sampling.grid(call.site), attention.layout.grid
            seen.setdefault(call.site.label, set()).add(grids)

    drawn(name, Grids(WHOLE[name]), num_steps=1)
    edge = family.latent_shape()[1] * family.pixels_per_latent
    with attach(family, Grids(WHOLE[name])):
        family.pipe(
            prompt=A, num_inference_steps=1, height=edge // 2, width=edge, output_type="latent", **_length(name)
        )
    assert all(known == found for grids in seen.values() for known, found in grids)
    assert all(len(grids) == 2 for grids in seen.values())


def test_a_word_that_nothing_stands_for_in_the_source_cannot_have_its_attention() -> None:
    edit = AttentionEdit("cross", source=Source("a cat", 0), how="refine", word_steps={"zebra": 0.5})
    with pytest.raises(UserError, match=r"word_steps\['zebra'\] changes nothing, for nothing in 'a cat' stands for it"):
        drawn("sd1", edit, prompts=("a zebra cat",))
    drawn("sd1", AttentionEdit("cross", source=Source("a cat", 0), word_steps={"zebra": 0.5}), prompts=("a zebra",))


@pytest.mark.parametrize("solver", ["euler", "heun", "pndm"])
@pytest.mark.parametrize("guide", [True, False])
def test_maps_count_each_step_once(solver: str, guide: bool) -> None:
    """... whatever a solver of higher order, or a loss that is followed, evaluates besides."""
    maps = AttentionMaps("mid.cross", by_step=True)
    guided = [Guide(loss=lambda image: image.square().mean(), scale=1.0)] if guide else []
    drawn("sd1", *guided, maps, num_steps=3, scheduler=solver)
    heads = {key.step: count for key, count in maps.maps.counts.items()}
    assert set(heads) == {0, 1, 2} and len(set(heads.values())) == 1
    (site,) = resolve(shared("sd1"), "mid.cross", kind=is_attention)
    assert heads[0] == site.module.heads


def test_words_are_refused_where_nobody_told_the_prompt() -> None:
    family = shared("sd1")
    with pytest.raises(UserError, match="give attach"), attach(family, Reweight("cross", weights={"cat": 2.0})):
        family.pipe(A, num_inference_steps=1, output_type="latent")
    with pytest.raises(UserError, match="one stream of double"):
        drawn("flux-dev", AttentionMaps("double.text.joint"))
