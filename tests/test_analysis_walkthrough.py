"""The walk through sampling: solvers, pictures on the way, words; each station by what must hold there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from esd.analysis import Results, Subject, walkthrough
from esd.analysis.walkthrough import (
    Learning,
    between,
    blueness,
    drawings,
    errors,
    guided_by,
    img2img,
    input_embeddings,
    learn,
    schedule,
    solve,
    strips,
    swapped,
    walk,
    with_new_word,
)
from esd.analysis.walkthrough.sampling_figures import falling, show_samplers
from esd.analysis.walkthrough.solvers import order
from esd.analysis.walkthrough.walker import Walk, share_seen
from esd.analysis.walkthrough.word_figures import told_swap
from esd.config.analyses import WalkthroughConfig
from esd.errors import UserError
from esd.evaluation.pixels import images_of
from esd.families import family_of
from tests import tiny
from tests.families import GUIDANCE, every, make, shared
from tests.programs import Command, erased_weights, table

A, B = "a cat", "the dog in mosaic style"


def subject(name: str, family: Any = None, steps: int = 3) -> Subject:
    return Subject(family or shared(name), num_steps=steps, guidance_scale=GUIDANCE[name])


@every
def test_signal_and_noise_add_up_and_the_visited_times_are_the_samplers(name: str) -> None:
    family = shared(name)
    found = schedule(family, 4)
    total = found.alpha + found.sigma if family.prediction_type == "flow" else found.alpha**2 + found.sigma**2
    assert np.allclose(total, 1, atol=1e-5) and (np.diff(found.sigma) > 0).all()
    assert found.visited.tolist() == family.scheduler(4).timesteps.tolist()


@pytest.mark.parametrize("make_it", [lambda: shared("sd1"), lambda: family_of(tiny.pipeline("v_prediction")),
                                      lambda: shared("sdxl-turbo")])  # fmt: skip
def test_samplers_solve_one_equation(make_it: Any) -> None:
    """Euler is DDIM in other variables; a second order comes nearer than the first; more steps come nearer."""
    family = make_it()
    own, noise, cond = (
        family.pipe.scheduler,
        family.initial_noise([torch.Generator().manual_seed(0)]),
        family.encode([A]),
    )

    def end(sampler: str, steps: int) -> torch.Tensor:
        return solve(family, noise, cond, sampler=sampler, num_steps=steps, guidance_scale=0.0)[0]

    exact, ddim = end("heun", 80), end("ddim", 10)
    off = float(errors(ddim, exact))
    assert float(errors(end("euler", 11), ddim)) < 0.05 * off  # DDIM's last call makes x_0
    assert float(errors(end("ddim", 20), exact)) < 0.7 * off < 0.7 * 0.7 * float(errors(end("ddim", 5), exact))
    for sampler in ("heun", "dpm++", "unipc"):
        assert float(errors(end(sampler, 10), exact)) < 0.7 * off, sampler
    calls = {s: solve(family, noise, cond, sampler=s, num_steps=4, guidance_scale=0.0)[1] for s in ("ddim", "heun")}
    assert calls == {"ddim": 5, "heun": 7} and family.pipe.scheduler is own


@pytest.mark.parametrize(("name", "steps"), [("sd1", 250), ("flux-dev", 400)])
def test_what_errors_are_held_against_is_itself_off_by_far_less(
    name: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd.analysis.walkthrough.solvers.REFERENCE_STEPS", steps)
    results = Results(tmp_path)
    show_samplers(Walk(subject(name), results, A, B, [0]), ["ddim", "heun"], [5, 10, 20])
    (held,) = table(tmp_path / "reference.csv")
    least = min(float(row["error"]) for row in table(tmp_path / "samplers.csv"))
    assert 0 < float(held["apart"]) < 0.2 * least
    assert (
        f"{float(held['apart']):.2g} away (dotted), the least error shown is {least:.2g}"
        in results.captions["samplers"]
    )


@pytest.mark.parametrize(("apart", "words"), [
    (0, "the prompt draws what 'a dog' draws: pictures differ by at most 0 of 255."),
    (2, "the prompt draws what 'a dog' draws: pictures differ by at most 2 of 255."),
    (3, "the prompt does not draw what 'a dog' draws: pictures differ by up to 3 of 255."),
])  # fmt: skip
def test_whether_another_words_embedding_is_that_word_is_told_by_the_pictures(apart: int, words: str) -> None:
    assert told_swap("a dog", apart) == words


@every
def test_predictions_of_the_clean_picture_fit_what_was_seen(name: str) -> None:
    family, told = shared(name), subject(name)
    t, x, clean = strips(told, family.encode([A]), [0])
    assert len(t) == 3 and x.shape == clean.shape == (3, 1, *family.sample_shape)
    drawn = walk(told, family.encode([A]), [0])
    assert torch.equal(x[0], drawn.inputs[0])
    if family.prediction_type == "flow":  # Euler's last step goes all the way to what it predicts
        torch.testing.assert_close(clean[-1], drawn.final, atol=1e-5, rtol=1e-4)
    assert np.array_equal(images_of(family, drawn.final), told.draw([A], [0]))


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("start", [1, 3])
def test_a_picture_goes_on_as_in_the_stock_img2img_pipeline(kind: Any, start: int) -> None:
    family = make("sd1")
    family.pipe.scheduler = kind.from_config({**family.pipe.scheduler.config, "clip_sample": False})
    x_0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    stock = StableDiffusionImg2ImgPipeline(**family.pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        A, image=x_0, strength=1 - start / 4, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    told = Subject(family, num_steps=4, guidance_scale=3.0)
    torch.testing.assert_close(img2img(told, x_0, family.encode([A]), [5], start), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["flux-dev", "sd3", "klein-base", "flux-schnell"])
def test_of_a_flow_nothing_is_left_at_the_first_step(name: str) -> None:
    family, told = shared(name), subject(name)
    x_0, cond = torch.ones(1, *family.sample_shape), family.encode([A])
    torch.testing.assert_close(img2img(told, x_0, cond, [0], 0), walk(told, cond, [0]).final, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(img2img(told, x_0, cond, [0], 2), walk(told, cond, [0]).final, atol=1e-2)


@every
def test_mixtures_end_at_both_prompts(name: str) -> None:
    one, other = (shared(name).encode([prompt]) for prompt in (A, B))
    for share, end in ((1.0, one), (0.0, other)):
        mixture = between(one, other, share)
        assert all(torch.equal(mixture.tensors[key], end.tensors[key]) for key in end.tensors)
    half = between(one, other, 0.5).tensors["encoder_hidden_states"]
    assert not torch.equal(half, one.tensors["encoder_hidden_states"])


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_another_words_embedding_is_that_word(name: str) -> None:
    family = make(name)
    before = family.encode(["a cat in mosaic style"])
    found, asked = swapped(family, ["a cat in mosaic style"], "cat", "dog"), family.encode(["a dog in mosaic style"])
    for key, tensor in asked.tensors.items():
        torch.testing.assert_close(found.tensors[key], tensor)
    family._encoded.clear()
    assert torch.equal(
        family.encode(["a cat in mosaic style"]).tensors["encoder_hidden_states"],
        before.tensors["encoder_hidden_states"],
    )
    with pytest.raises(UserError, match=r"'zebra' is several tokens"):
        swapped(family, [A], "cat", "zebra")


def test_the_encoder_begins_with_token_plus_place() -> None:
    found = input_embeddings(shared("sd1"), A)
    assert len(found.tokens) == 4 and found.tokens[2] == "cat</w>" and found.places.shape == (tiny.LENGTH, 16)
    torch.testing.assert_close(found.read, found.token + found.position)


@pytest.mark.parametrize("name", ["sd1", "flux-schnell", "klein"])
def test_a_loss_steers_the_picture(name: str) -> None:
    told = subject(name)
    plain, more, less = (guided_by(told, [A], [0], blueness, scale) for scale in (0.0, 30.0, -30.0))
    assert np.array_equal(plain, told.draw([A], [0]))
    off = [float(np.abs(images[..., 2] / 255 - 0.9).mean()) for images in (more, plain, less)]
    assert off[0] < off[1] < off[2]


def test_a_new_word_is_learned_and_nothing_else() -> None:
    family = make("sd1")
    told = Subject(family, num_steps=2, guidance_scale=3.0)
    weights = {
        name: value.clone()
        for part in (family.denoiser, family.pipe.text_encoder)
        for name, value in part.state_dict().items()
    }
    before = family.encode([A]).tensors["encoder_hidden_states"]
    found = learn(told, A, "cat", [0, 1], Learning(concept="cat", steps=20, lr=0.05, every=10, examples=4))
    assert [one.update for one in found] == [0, 10, 20] and found[-1].loss < found[0].loss
    assert found[0].images.shape == (2, 16, 16, 3) and not torch.equal(found[0].embeddings[0], found[2].embeddings[0])
    after = {
        name: value for part in (family.denoiser, family.pipe.text_encoder) for name, value in part.state_dict().items()
    }
    assert all(torch.equal(value, after[name]) for name, value in weights.items())
    family._encoded.clear()
    assert torch.equal(family.encode([A]).tensors["encoder_hidden_states"], before)
    cond = with_new_word(family, [A], "cat", found[-1].embeddings)
    assert np.array_equal(images_of(family, walk(told, cond, [0]).final), found[-1].images[:1])
    cat = with_new_word(family, [A], "cat", family.embeddings_of("cat"))
    torch.testing.assert_close(cat.tensors["encoder_hidden_states"], before)


def test_drawings_come_from_files(tmp_path: Path) -> None:
    told = subject("sd1")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    Image.new("RGBA", (16, 16), (0, 0, 255, 0)).save(tmp_path / "clear.png")
    found = drawings(told, [str(tmp_path / "red.png"), str(tmp_path / "clear.png")])
    white = torch.ones(1, 3, 16, 16)
    assert found.shape == (2, *told.family.sample_shape)
    torch.testing.assert_close(found[1:], told.family.encode_images(white))
    learned = learn(told, A, "cat", [0], Learning(concept="cat", steps=1, every=1, examples=3, drawings=found))
    other = learn(told, A, "cat", [0], Learning(concept="cat", steps=1, every=1, examples=3))
    assert learned[0].loss != other[0].loss
    with pytest.raises(UserError, match=r"drawings: .*none.png' cannot be read"):
        drawings(told, [str(tmp_path / "none.png")])


FEW: dict[str, Any] = {
    "prompt": "a cat in mosaic style", "other": "a dog", "pictures": 2, "samplers": ["ddim", "heun"],
    "sampler_steps": [2, 4], "elsewhere": ["the cat"], "updates": 2, "starts": [0.0, 0.5], "shares": [0.0, 1.0],
    "scales": [0.0, 0.5, 1.0, 3.0], "blue": [0.0, 5.0],
}  # fmt: skip
OF_WORDS = {"embeddings", "swap", "new_word", "new_word_elsewhere"}
OF_ALL = {"schedule", "samplers", "strips", "img2img", "mixtures", "blue"}


@pytest.mark.parametrize(
    ("name", "figures", "left_out"),
    [
        ("sd1", OF_ALL | OF_WORDS | {"guidance"}, ["between 0 and 1"]),
        ("sd3", OF_ALL | {"guidance"}, ["samplers other", "between 0 and 1", "embeddings"]),
        ("flux-dev", OF_ALL | {"guidance"}, ["samplers other", "embeddings"]),
        ("flux-schnell", OF_ALL, ["samplers other", "guidance scales", "embeddings"]),
    ],
)
def test_what_a_model_has_is_shown_and_the_rest_left_out_in_words(
    name: str, figures: set[str], left_out: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd.analysis.walkthrough.solvers.REFERENCE_STEPS", 10)
    results = Results(tmp_path)
    walkthrough.analyse(subject(name, steps=2), results, **vars(WalkthroughConfig(**FEW)))
    assert set(results.captions) == {path.stem for path in tmp_path.glob("*.png")} == figures
    assert len(results.notes) == len(left_out)
    assert all(words in note for words, note in zip(left_out, results.notes, strict=True))
    samplers = {row["sampler"] for row in table(tmp_path / "samplers.csv")}
    assert samplers == ({"ddim", "heun"} if name == "sd1" else {"euler"})
    if name == "sd1":
        assert "at most 0 of 255" in results.captions["swap"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("walkthrough.words=[cat]", "walkthrough.words=['cat']: allowed: two words"),
        ("walkthrough.prompt=a rose", "walkthrough.prompt='a rose' does not hold 'cat'"),
        ("walkthrough.samplers=[ddpm]", "walkthrough.samplers: 'ddpm'; allowed: ddim, euler"),
        ("walkthrough.starts=[1.0]", "walkthrough.starts"),
        ("layers.pictures=3", "says nothing to analysis=walkthrough"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(command: Command, setting: str, told: str) -> None:
    ended = command("analyze", "analysis=walkthrough", "model.path=base", "run_dir=out", setting)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (command.folder / "out").exists()


def test_a_word_that_the_model_spells_is_refused(command: Command) -> None:
    ended = command(
        "analyze", "analysis=walkthrough", "model.path=base", "run_dir=out", "walkthrough.words=[cat,zebra]"
    )
    assert ended.code == 2 and "'zebra' is several tokens" in ended.err, ended.err


def test_drawings_that_cannot_be_read_are_refused_before_the_first_station(tmp_path: Path) -> None:
    settings = WalkthroughConfig(**FEW | {"drawings": [str(tmp_path / "nothing.png")]})
    with pytest.raises(UserError, match=r"walkthrough\.drawings: .*nothing.png' cannot be read"):
        walkthrough.analyse(subject("sd1", steps=2), Results(tmp_path / "out"), **vars(settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
def test_an_order_takes_two_numbers_of_calls_and_errors_that_are_some() -> None:
    assert order([5, 10, 20], [0.4, 0.1, 0.025]) == pytest.approx(2)
    assert order([5, 10, 1000], [0.4, 0.2, 0.0]) == pytest.approx(1), "the reference itself"
    assert order([5], [0.4]) is None and order([5, 5], [0.4, 0.4]) is None
    assert falling(np.array([5]), np.array([0.4])) == "0.4 with 5 calls"
    assert (
        falling(np.array([5, 10]), np.array([0.4, 0.2])) == "0.4 with 5 calls, 0.2 with 10 calls, falling as calls^-1.0"
    )


def test_an_erased_model_learns_from_what_the_base_draws(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esd.analysis.walkthrough.solvers.REFERENCE_STEPS", 10)
    erased_weights(command.folder / "weights/erased.safetensors")
    settings = [f"walkthrough.{key}={value}" for key, value in FEW.items()]
    fast = ("analysis=walkthrough", "model.path=base", "num_steps=2", "device=cpu", "checkpoint=weights", *settings)
    ended = command("analyze", *fast, "run_dir=out")
    assert ended.code == 0, ended.err
    captions = (command.folder / "out/captions.md").read_text()
    assert "Learned from 6 pictures that the base draws of the prompt" in captions
    told = (command.folder / "out/facts.json").read_text()
    assert '"concepts"' in told


def test_what_the_judge_cannot_tell_is_not_told() -> None:
    rows: list[dict[str, Any]] = [
        {"scale": 2.0, "thing": 0.5, "style": 1.0}, {"scale": 4.0, "thing": 0.25, "style": None}
    ]  # fmt: skip
    told = share_seen(rows, "s = {scale:g}", "both", "thing", "style")
    assert told == " Share in which the judge sees both: s = 2: 50% and 100%."
    assert share_seen(rows, "{scale:g}", "it", "thing").endswith(": 2: 50%; 4: 25%.")
    assert share_seen(rows[1:], "{scale:g}", "it", "style") == ""
