"""Attacks: counted at the denoiser, beside their controls, and over without a trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import esd
from esd import checkpoint, seeding
from esd.config.evaluate import ATTACKS
from esd.errors import UserError
from esd.evaluation import attacks
from esd.evaluation.attacks import (
    Budget,
    Completion,
    ConceptScorer,
    Inpainting,
    Inversion,
    Model,
    NoiseProbe,
    SoftPrompt,
)
from esd.evaluation.attacks.budget import Meter, OutOfBudgetError, cost
from esd.evaluation.attacks.inpainting import middle
from esd.evaluation.attacks.learning import denoising_loss
from esd.evaluation.attacks.noise import ddim_step, noisy_ddim
from esd.evaluation.attacks.recovery import Curve, Point
from esd.evaluation.attacks.subject import Subject
from esd.evaluation.erasure import DrawSettings
from esd.evaluation.generate import sample
from esd.evaluation.judges import Readings
from esd.evaluation.metrics import wilson
from esd.evaluation.prompts import PromptRow
from esd.families import family_of
from esd.trajectory import rollout
from tests import tiny
from tests.families import UNETS
from tests.families import erased as erased_weights
from tests.families import make as fresh

FLOWS = ("sd3", "flux-dev", "klein")
DRAW = DrawSettings(num_steps=2, guidance_scale=3.0, batch_size=4)
ROWS = [PromptRow(3, "a cat", 11), PromptRow(7, "the cat in mosaic style", 12)]
QUICK = {
    "noise": NoiseProbe(etas=(1.85,), scales=(1.0, 1.04)),
    "completion": Completion(interrupts=(1,)),
    "inpainting": Inpainting(hidden=(0.5,)),
    "soft_prompt": SoftPrompt(steps=2, every=2, batch_size=2, examples=3, tokens=2),
    "inversion": Inversion(concept="cat", steps=2, every=2, batch_size=2, examples=3),
}
# a random text encoder is rough: the loss falls for all noise only where much of it is averaged
INVERSION = Inversion(concept="cat", steps=12, every=12, lr=3e-3, batch_size=24, examples=48)
FITTING = [  # completion and inpainting are tried on all families further down
    *(("sd1", attack) for attack in QUICK),
    *((name, attack) for name in ("sd2-v", "sdxl") for attack in ("noise", "soft_prompt", "inversion")),
    ("sdxl-turbo", "noise"),
    *((name, "soft_prompt") for name in FLOWS),
]


class Redness:
    """Scores a picture by its red channel: any picture has a score, and no judge is needed."""

    name, version, threshold, hash = "redness", "1", 0.5, "none"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images[..., 0].mean((1, 2)) / 255


SCORER = Redness()


def make(name: str, folder: Path) -> Any:
    """A fresh family that wears erased weights, which change what it draws."""
    family = fresh(name)
    esd.apply(family.pipe, erased_weights(family, folder / f"{name}.safetensors", "to_k", "to_out"))
    return family


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Families that wear erased weights, made once each; no attack may leave a trace on them."""
    folder, made = tmp_path_factory.mktemp("erased"), dict[str, Any]()

    def get(name: str) -> Any:
        if name not in made:
            made[name] = make(name, folder)
        return made[name]

    return get


def run(family: Any, attack: Any, budget: Budget | None = None, **how: Any) -> attacks.Recovery:
    settings = {"scorer": SCORER, "draw": DRAW, **how}
    return attack.run(Model.wearing(family), settings.pop("rows", ROWS), budget or Budget(), **settings)


def subject(family: Any, draw: DrawSettings = DRAW) -> Subject:
    model = Model.wearing(family)
    return Subject(family, family.denoiser, model.base, ROWS, draw, 0)


def state(family: Any) -> dict[str, Tensor]:
    """Every tensor of the pipeline's networks, copied."""
    parts = {name: part for name, part in family.pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": v.clone() for name, part in parts.items() for key, v in part.state_dict().items()}


def required(family: Any) -> list[bool]:
    return [p.requires_grad for part in family.pipe.components.values() if isinstance(part, torch.nn.Module)
            for p in part.parameters()]  # fmt: skip


class Hooks:
    """What hooks on the denoiser itself count."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.queries = self.gradients = 0
        self.handle = denoiser.register_forward_hook(self._forward, with_kwargs=True)

    def _forward(self, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.queries += len(output[0])
        if output[0].requires_grad:
            output[0].register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.gradients += len(gradient)

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_what_an_attack_spent_is_what_the_denoiser_saw_and_nothing_is_left_behind(
    families: Any, name: str, kind: str
) -> None:
    family, attack = families(name), QUICK[kind]
    before, asked = state(family), required(family)
    with Hooks(family.denoiser) as hooks:
        recovery = run(family, attack)
    curves = recovery.curves
    assert set(curves) == {"erased", "erased_control", "base", "base_control"}
    last = [curve.points[-1] for curve in curves.values()]
    assert sum(point.gradients for point in last) == hooks.gradients
    allowed = [cost(curves[k].points[-1].queries, curves[k].points[-1].gradients) for k in ("erased", "base")]
    for most, model in zip(allowed, ("erased", "base"), strict=True):
        assert curves[f"{model}_control"].points[-1].queries <= most
    begun = {"soft_prompt", "inversion"} & {kind}  # a control that is stopped has spent on a try that is not there
    spent = sum(point.queries for point in last)
    assert spent == hooks.queries if not begun else spent <= hooks.queries
    assert all(point.gradients == 0 for point in (curves["erased_control"].points + curves["base_control"].points))
    assert (curves["erased"].points[-1].gradients > 0) == bool(begun)
    size = family.sample_shape[1] * family.pixels_per_latent
    after = state(family)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert required(family) == asked
    for curve in curves.values():
        assert curve.images.shape == (2, size, size, 3) and curve.images.dtype == np.uint8
        assert not curve.points[0].tried
        assert all(one.queries < two.queries for one, two in zip(curve.points, curve.points[1:], strict=False))
        assert all(point.scores.shape == (2,) for point in curve.points)


@pytest.mark.parametrize("kind", list(QUICK))
def test_the_first_point_is_the_pipelines_own_drawing(families: Any, kind: str) -> None:
    family = families("sd1")
    curves = run(family, QUICK[kind]).curves
    prompts, seeds = [row.prompt for row in ROWS], [row.evaluation_seed for row in ROWS]
    drawn = sample(family.pipe, prompts, seeds, num_steps=2, guidance_scale=3.0, batch_size=3)
    for one in ("erased", "erased_control"):
        np.testing.assert_allclose(curves[one].points[0].scores, SCORER(drawn), atol=2 / 255)


@pytest.mark.parametrize("name", [*UNETS, *FLOWS])
def test_completion_goes_from_the_erased_models_pictures_to_the_bases(families: Any, name: str) -> None:
    family = families(name)
    one = subject(family)
    steps = len(family.scheduler(2).timesteps)
    none, some, every = (t.latents for t in Completion(interrupts=(0, 1, steps)).tries(one))
    assert torch.equal(none, one.plain())
    base = one.sample(one.base, one.conditioning(), one.own())
    assert torch.equal(every, base)
    assert not torch.equal(some, none) and not torch.equal(some, every)
    with pytest.raises(UserError, match="interrupts"):
        run(family, Completion(interrupts=(steps + 1,)))


@pytest.mark.parametrize("name", [*UNETS, *FLOWS])
def test_inpainting_goes_from_the_erased_models_pictures_to_the_bases(families: Any, name: str) -> None:
    family = families(name)
    one = subject(family)
    all_hidden, half, none_hidden = (t.latents for t in Inpainting(hidden=(1.0, 0.5, 0.0)).tries(one))
    assert torch.equal(all_hidden, one.plain())
    base = one.sample(one.base, one.conditioning(), one.own())
    assert torch.equal(none_hidden, base)
    mask = middle(base, 0.5).expand_as(base)
    assert torch.equal(half[~mask], base[~mask]) and not torch.equal(half[mask], base[mask])
    assert float(middle(base, 0.5).float().mean()) == 0.25


@pytest.mark.parametrize("name", UNETS)
def test_a_probe_without_noise_is_ddim(families: Any, name: str) -> None:
    family = families(name)
    one = subject(family)
    expected = rollout(
        family, family.denoiser, family.initial_noise(one.own()), one.conditioning(), family.null(), num_steps=2,
        guidance_scale=3.0, scheduler="ddim",
    ).final  # fmt: skip
    got = noisy_ddim(one, one.own(), one.fresh("noise"), eta=0.0, scale=1.0)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_noisy_step_is_the_schedulers(kind: Any, eta: float) -> None:
    family = family_of(tiny.pipeline(kind))
    solver = family.scheduler(4, "ddim")
    x, said, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for t in solver.timesteps[:-1]:
        expected = solver.step(said, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        here, there = (float(solver.alphas_cumprod[int(u)]) for u in (t, t - 250))
        torch.testing.assert_close(
            ddim_step(x, said, noise, kind, here, there, eta=eta), expected, atol=1e-4, rtol=1e-4
        )
    assert ddim_step(x, said, noise, kind, here, there, eta=1.85).isfinite().all()


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "pndm", "dpm++", "heun", "lms"])
def test_noised_latents_are_those_of_the_scheduler(scheduler: str) -> None:
    family = family_of(tiny.pipeline())
    one = Subject(family, family.denoiser, family.denoiser, ROWS, DRAW, 0)
    x, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    solver = family.scheduler(5, scheduler)
    for i in (0, 2):
        t = solver.timesteps[i]
        expected = family.scheduler(5, scheduler).add_noise(x, noise, t.expand(2))
        torch.testing.assert_close(
            one.noised(family.scheduler(5, scheduler), x, noise, t), expected, atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        *((name, SoftPrompt(steps=16, every=16, lr=1e-2, batch_size=12)) for name in ("sd1", "sd2-v", "sdxl", *FLOWS)),
        *((name, INVERSION) for name in ("sd1", "sdxl")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_is_learned_lowers_its_own_loss(families: Any, name: str, attack: Any) -> None:
    family = families(name)
    with Model.wearing(family).at_work():
        first, last = attack.tries(subject(family, dataclasses.replace(DRAW, batch_size=64)))
    assert last.tried["loss"] < first.tried["loss"]
    assert not torch.equal(first.found[0], last.found[0])


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sd3"])
def test_the_loss_of_a_perfect_prediction_is_zero(families: Any, name: str) -> None:
    family, x = families(name), torch.randn(2, *families(name).sample_shape)
    sources = seeding.generators(0, "test", 0, range(2))
    zero = {  # what α x_0 + σ ε and the right answer are, where the answer is read off x_t and x_0
        "epsilon": lambda x_t, a, s: (x_t - a * x) / s,
        "v_prediction": lambda x_t, a, s: a * (x_t - a * x) / s - s * x,
        "flow": lambda x_t, a, s: (x_t - a * x) / s - x,
    }[family.prediction_type]

    def knows(x_t: Tensor, t: Tensor | None = None, timestep: Tensor | None = None, **_: Any) -> tuple[Tensor]:
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in family.alpha_sigma(t if timestep is None else timestep))
        return (zero(x_t, alpha, sigma),)

    loss = denoising_loss(family, knows, x, family.encode(["a cat", "a dog"]), sources)
    assert float(loss) < 1e-6


@pytest.mark.parametrize("kind", ["noise", "soft_prompt", "inversion"])
def test_a_budget_is_kept_and_ends_a_run_cleanly(families: Any, kind: str) -> None:
    family, attack = families("sd1"), dataclasses.replace(QUICK[kind], **({} if kind == "noise" else {"steps": 9}))
    for limit, most in (("queries", 25), ("gradients", 5)):
        if kind == "noise" and limit == "gradients":
            continue
        curves = run(family, attack, Budget(**{limit: most})).curves
        for model in ("erased", "base"):
            assert curves[model].stopped == f"{limit}={most}"
            assert curves[model].points[-1].queries > 0
            assert all(getattr(point, limit) <= most for point in curves[model].points)
    with pytest.raises(UserError, match="queries=3"):
        run(family, attack, Budget(queries=3))


def test_a_meter_counts_and_stops_before_the_limit(families: Any) -> None:
    family, now = families("sd1"), iter([0.0, 1.0, 2.0, 6.0, 9.0])
    x, cond, t = torch.randn(3, 4, 8, 8), family.encode(["a cat"] * 3), torch.tensor(5.0)
    with Hooks(family.denoiser) as hooks:
        meter = Meter(Budget(queries=7, gradients=4))
        watched = meter.watch(family.denoiser)
        x.requires_grad_(True)
        family.predict(watched, x, t, cond).sum().backward()
        assert (meter.queries, meter.gradients) == (3, 3) == (hooks.queries, hooks.gradients)
        with pytest.raises(OutOfBudgetError, match="gradients=4"):
            family.predict(watched, x, t, cond)
        with torch.no_grad():
            family.predict(watched, x, t, cond)
            with pytest.raises(OutOfBudgetError, match="queries=7"):
                family.predict(watched, x, t, cond)
        assert (meter.queries, meter.gradients) == (6, 3) == (hooks.queries, hooks.gradients)
    family.denoiser.zero_grad(set_to_none=True)
    timed = Meter(Budget(seconds=5), clock=lambda: next(now))
    watched = timed.watch(lambda x: (x,))
    with torch.no_grad():
        watched(x)
        watched(x)
        with pytest.raises(OutOfBudgetError, match="seconds=5"):
            watched(x)


@pytest.mark.parametrize("kind", list(QUICK))
def test_an_exception_leaves_no_trace(families: Any, kind: str) -> None:
    family = families("sdxl")
    before, asked, reads = state(family), required(family), family.encode(["a cat", "a dog"]).tensors
    family.denoiser.conv_in.weight.requires_grad_(False)  # what was frozen stays so
    asked = required(family)
    calls = iter(range(9))

    class Breaks(Redness):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            if next(calls) == 2:
                raise RuntimeError("the judge broke")
            return super().__call__(images)

    with pytest.raises(RuntimeError, match="the judge broke"):
        run(family, QUICK[kind], scorer=Breaks())
    after = state(family)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert required(family) == asked
    family.denoiser.conv_in.weight.requires_grad_(True)
    family._encoded.clear()
    assert all(torch.equal(v, reads[k]) for k, v in family.encode(["a cat", "a dog"]).tensors.items())
    assert not any(table._forward_hooks for table in family.embedding_tables())


@pytest.mark.parametrize("kind", list(QUICK))
def test_an_attack_does_not_depend_on_its_batch(families: Any, kind: str) -> None:
    family = families("sd1")
    with Model.wearing(family).at_work():
        one, many = (
            list(QUICK[kind].tries(subject(family, dataclasses.replace(DRAW, batch_size=size)))) for size in (1, 5)
        )
    for first, second in zip(one, many, strict=True):
        torch.testing.assert_close(first.latents, second.latents, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["noise", "completion", "inpainting"])
def test_a_rows_pictures_do_not_depend_on_other_rows(families: Any, kind: str) -> None:
    family = families("sd1")
    together, alone = (
        np.stack([point.scores[-1] for point in run(family, QUICK[kind], rows=rows).curves["erased_control"].points])
        for rows in (ROWS, ROWS[1:])
    )
    np.testing.assert_allclose(together, alone, atol=2 / 255)


def test_the_new_word_reads_as_the_old_one_with_the_old_embedding(families: Any) -> None:
    for name in ("sd1", "sdxl"):
        family = families(name)
        word = family.unused_word(["a cat", "photo of the dog"])
        assert word not in ("a", "cat", "photo", "of", "the", "dog")
        tokenizer = family.pipe.tokenizer
        (cat,) = tokenizer("cat", add_special_tokens=False).input_ids
        embeddings = [table.weight[cat].detach().clone() for table in family.embedding_tables()]
        with torch.no_grad():
            read = family.encode_with([f"a {word}"], word, embeddings).tensors
        for key, value in family.encode(["a cat"]).tensors.items():
            torch.testing.assert_close(read[key], value)
    with pytest.raises(UserError, match="every whole word"):
        family.unused_word(list(tiny.WORDS))


def test_the_first_picture_that_shows_the_concept_counts_and_is_kept(families: Any) -> None:
    family, given = families("sd1"), iter([[0.1, 0.2], [0.6, 0.1], [0.9, 0.3], [0.2, 0.1]] * 4)
    seen: list[np.ndarray] = []

    class Scripted(Redness):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            seen.append(images)
            return np.array(next(given))

    attack = NoiseProbe(etas=(1.85,), scales=(1.0, 1.02, 1.04))
    curve = run(family, attack, scorer=Scripted()).curves["erased"]
    assert curve.shown("alone").T.tolist() == [[False, True, True, False], [False] * 4]
    assert curve.shown("best").T.tolist() == [[False, True, True, True], [False] * 4]
    assert np.array_equal(curve.images[0], seen[1][0])  # the first that shows it
    assert np.array_equal(curve.images[1], seen[2][1])  # none does: the nearest


def test_a_curve_tells_both_rates_with_their_intervals() -> None:
    points = [Point({}, 0, 4, 0.5, np.array([0.1, 0.7])), Point({"update": 2.0}, 3, 9, 1.5, np.array([0.5, 0.2]))]
    pictures = np.zeros((2, 4, 4, 3), np.uint8)
    told = Curve(tuple(points), 0.5, pictures, pictures, "queries=9").told()
    assert json.loads(json.dumps(told)) == told and told["stopped"] == "queries=9"
    first, last = told["points"]
    assert (first["alone"]["k"], first["best"]["k"], last["alone"]["k"], last["best"]["k"]) == (1, 1, 1, 2)
    assert last["cost"] == 9 + 2 * 3 and last["scores"] == [0.5, 0.2] and last["tried"] == {"update": 2.0}
    assert last["best"]["rate"] == 1 and last["best"]["interval"] == list(wilson(2, 2))


class Says:
    """A judge with given readings of three pictures."""

    name, version, hash, validated, size = "says", "1", "none", "nothing", None
    questions: tuple[str, ...] = ("thing", "style")
    unsure: tuple[str, ...] = ("thing",)
    threshold = 0.4

    def __call__(self, images: np.ndarray) -> Readings:
        names = {"thing": ["cat", "cat", "dog"], "style": ["flat", "mosaic", "mosaic"]}
        p = {"thing": np.array([0.9, 0.3, 0.8]), "style": np.array([0.9, 0.5, 0.6])}
        return Readings(names, p, {"thing": 0.4})


class Detects(Says):
    questions = unsure = ("nudity",)

    def __call__(self, images: np.ndarray) -> Readings:
        return Readings({"nudity": ["", "breast", "breast"]}, {"nudity": np.array([0.0, 0.3, 0.8])})


class Halves(Says):
    questions = unsure = ("first", "second")


PICTURES = np.zeros((3, 64, 64, 3), np.uint8)


def shown(scorer: ConceptScorer) -> list[bool]:
    return (scorer(PICTURES) >= scorer.threshold).tolist()


def test_the_judges_word_is_the_score() -> None:
    cat, mosaic = ConceptScorer(Says(), "thing", "Cat"), ConceptScorer(Says(), "style", "mosaic")
    assert cat(PICTURES).tolist() == [0.9, 0.3, 0.0] and cat.name == "says: Cat"
    assert shown(cat) == [True, False, False] and shown(ConceptScorer(Says(), "thing", "cat", 0.2)) == [
        True,
        True,
        False,
    ]
    assert shown(mosaic) == [False, True, True]  # believed always
    assert shown(ConceptScorer(Detects(), "nudity", None)) == [False, False, True]


def test_a_scorer_reads_what_all_prompts_ask_for() -> None:
    rows = [
        PromptRow(i, "a cat", i, labels={"style": style, "thing": "cat"}) for i, style in enumerate(["flat", "neon"])
    ]
    found = ConceptScorer.of_rows(Says(), rows)
    assert (found.question, found.answer) == ("thing", "cat")
    same = [PromptRow(i, "a cat in mosaic", i, labels={"thing": "cat", "style": "mosaic"}) for i in range(2)]
    for concept, question in (("mosaic", "style"), ("cat", "thing")):
        assert ConceptScorer.of_rows(Says(), same, concept=concept).question == question
    detects = ConceptScorer.of_rows(Detects(), ROWS, 0.25)
    assert detects.answer is None and shown(detects) == [False, True, True]
    for odd in (ROWS, [rows[0], PromptRow(3, "a dog", 1, labels={"style": "neon", "thing": "dog"})]):
        with pytest.raises(UserError, match="share no label"):
            ConceptScorer.of_rows(Says(), odd)


def test_a_scorer_of_another_concept_than_the_attacks_is_refused() -> None:
    def asking(**labels: str) -> list[PromptRow]:
        return [PromptRow(i, "a prompt", i, labels=labels) for i in range(2)]

    dogs = asking(thing="dog")
    mixed = [PromptRow(i, "", i, labels={"thing": thing, "style": "mosaic"}) for i, thing in enumerate(["cat", "dog"])]
    for rows, shared in ((dogs, r"dog \(thing\)"), (mixed, r"mosaic \(style\)")):
        with pytest.raises(UserError, match=f"share is {shared}, while the attack is to bring back 'cat'"):
            ConceptScorer.of_rows(Says(), rows, concept="cat")
    assert ConceptScorer.of_rows(Says(), dogs, concept="A dog").answer == "dog"
    called = ConceptScorer.of_rows(Says(), asking(thing="Kitty"), concept="cat", synonyms=("kitty", "feline"))
    assert (called.answer, shown(called)) == ("cat", [True, False, False]), "the judge says cat, not kitty"
    assert ConceptScorer.of_rows(Detects(), asking(nudity="80"), concept="nudity").answer is None
    assert ConceptScorer.of_rows(Detects(), dogs, concept="cat").answer is None, "a detector needs no label"
    with pytest.raises(UserError, match="reads first, second, and the prompts share no label"):
        ConceptScorer.of_rows(Halves(), dogs, concept="dog")


def test_words_that_a_judge_knows_for_one_thing_are_one_concept() -> None:
    class Lists(Says):
        questions, unsure, labels = ("class",), (), ("tench, Tinca tinca", "goldfish")

    latin = [PromptRow(i, "", i, labels={"class": "Tinca tinca"}) for i in range(2)]
    assert ConceptScorer.of_rows(Lists(), latin, concept="tench").answer == "Tinca tinca"
    with pytest.raises(UserError, match="bring back 'goldfish'"):
        ConceptScorer.of_rows(Lists(), latin, concept="goldfish")


@pytest.mark.parametrize(
    ("name", "attack", "rows", "message"),
    [
        ("sd3", QUICK["noise"], ROWS, "epsilon or v"),
        ("flux-dev", QUICK["inversion"], ROWS, "Stable Diffusion 1, 2 and XL"),
        ("sd1", dataclasses.replace(QUICK["inversion"], concept="rose"), ROWS, "row 3"),
        ("sd1", dataclasses.replace(QUICK["inversion"], concept=""), ROWS, "'cat'"),
        ("sd1", SoftPrompt(tokens=99), ROWS, "reads 12 tokens"),
        ("sd1", QUICK["noise"], [], "at least one"),
        ("sd1", QUICK["noise"], [ROWS[0], PromptRow(9, "a cat", 1, guidance=1.5)], r"\[1.5, 3.0\]"),
        ("sd1", QUICK["noise"], [PromptRow(9, "a cat", 1, height=32, width=32)], "case_number 9 asks for a size"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(families: Any, name: str, attack: Any, rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(families(name), attack, rows=rows)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Budget(queries=0),
        lambda: NoiseProbe(etas=()),
        lambda: NoiseProbe(scales=(0.0,)),
        lambda: Completion(interrupts=(-1,)),
        lambda: Inpainting(hidden=(1.5,)),
        lambda: SoftPrompt(tokens=0),
        lambda: SoftPrompt(lr=float("nan")),
        lambda: Inversion(steps=0),
        lambda: attacks.make("telepathy", {}),
        lambda: attacks.make("soft_prompt", {"token": 2}),
        lambda: attacks.make("soft_prompt", {"tokens": 2.5}),
        lambda: attacks.make("soft_prompt", {"lr": "fast"}),
        lambda: attacks.make("soft_prompt", {"steps": True}),
        lambda: attacks.make("noise", {"etas": 1.0}),
        lambda: attacks.make("completion", {"interrupts": [1, 2.5]}),
    ],
)
def test_settings_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="allowed"):
        wrong()


@pytest.mark.parametrize("kind", list(QUICK))
def test_an_attack_is_made_again_from_its_name_and_its_settings_as_json(kind: str) -> None:
    assert attacks.make(kind, json.loads(json.dumps(QUICK[kind].settings))) == QUICK[kind]
    assert attacks.make(kind, {}) == type(QUICK[kind])()


def test_the_configuration_knows_every_attack() -> None:
    assert tuple(QUICK) == ATTACKS
    assert attacks.make("noise", {"etas": [1, 2]}) == NoiseProbe(etas=(1, 2))  # a whole number is a number


def test_a_model_without_erased_weights_or_with_checkpointing_is_refused() -> None:
    family = family_of(tiny.pipeline())
    with pytest.raises(UserError, match="wears no erased weights"):
        Model.wearing(family)
    family.denoiser.enable_gradient_checkpointing()
    with pytest.raises(UserError, match="disable_gradient_checkpointing"):
        QUICK["noise"].run(Model(family, family.denoiser), ROWS, Budget(), scorer=SCORER, draw=DRAW)


def test_the_base_beside_erased_weights_is_the_base(families: Any) -> None:
    family = families("sd1")
    base = family_of(tiny.every("sd1"))
    view, x, t = checkpoint.base_view(family.pipe), torch.randn(2, 4, 8, 8), torch.tensor(5.0)
    cond = base.encode(["a cat", "a dog"])
    with torch.no_grad():
        expected = base.predict(base.denoiser, x, t, cond)
        assert torch.equal(family.predict(view, x, t, cond), expected)
        assert not torch.equal(family.predict(family.denoiser, x, t, cond), expected)


def test_a_foreign_base_is_frozen_too_and_keeps_no_gradients(families: Any) -> None:
    family, other = families("sd1"), tiny.every("sd1").unet
    QUICK["soft_prompt"].run(Model(family, other), ROWS, Budget(), scorer=SCORER, draw=DRAW)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in other.parameters())


def test_the_base_view_follows_its_denoiser_to_another_device(families: Any, tmp_path: Path) -> None:
    family = make("sd1", tmp_path)
    view, x, t = checkpoint.base_view(family.pipe), torch.randn(2, 4, 8, 8), torch.tensor(5.0)
    cond = family.encode(["a cat", "a dog"])
    with torch.no_grad():
        here = family.predict(view, x, t, cond)
        family.denoiser.to("meta")
        there = family.predict(view, x.to("meta"), t.to("meta"), cond.to("meta"))
    assert here.device.type == "cpu" and there.device.type == "meta" and here.shape == there.shape


@pytest.mark.parametrize("kind", ["completion", "inversion"])
def test_parts_are_on_the_device_while_they_work_and_prompts_are_read_before(families: Any, kind: str) -> None:
    family, seen = family_of(families("sd1").pipe), list[tuple[str, ...]]()

    def place(*parts: Any) -> None:
        seen.append(parts)
        assert set(family._encoded) == {"", *(row.prompt for row in ROWS)}

    family.place = place  # type: ignore[method-assign]
    run(family, QUICK[kind])
    assert seen == [QUICK[kind].parts, ()] and ("encoders" in seen[0]) == (kind == "inversion")
