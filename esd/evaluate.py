"""Measure an erased checkpoint.

    python -m esd.evaluate checkpoint=runs/cat images_per_prompt=3 \\
        prompts='["a cat in the {style} style", "a {thing} in the neon style"]'

`suite=prompts` draws a set of prompts with the base and with the erased model from the same seeds, and has judges read
the pictures. Leaves `base/` and `erased/` (images and manifests), `images.csv` (a row for every image and model, with
all that was read and how sure) and `metrics.json` (rates with intervals, distances, what it took). The same command
resumes; `accelerate launch -m esd.evaluate` shares the drawing out. `suite=implicit` finds its own prompts: what was
erased, asked for in other ways.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd.attacks import evaluate_attacks
from esd.canvas import evaluate_canvas
from esd.config.evaluate import EvaluateConfig
from esd.drawing import (
    announce,
    announce_drawing,
    announce_lost,
    draw,
    find_share,
    limited,
    look_inside,
    peak_gib,
    plan,
    rows_of,
)
from esd.errors import UserError
from esd.judging import answers_of, check_pictures, find_named, own_judges
from esd.main import run_program
from esd.model import check, load
from esd.run import RunDirectory

if TYPE_CHECKING:
    from esd.checkpoint import Erased
    from esd.evaluation.generate import Manifest
    from esd.evaluation.judges import Judge, PairJudge
    from esd.evaluation.prompts import PromptRow
    from esd.evaluation.split import Split
    from esd.evaluation.vocabulary import Vocabulary
    from esd.families import Family

EACH_WAY = 40  # prompts of each way to ask, unless limit says otherwise
FEW = 30  # pictures of what was erased, of which a rate of 0% still has an interval of 11 points


@dataclass(frozen=True)
class Readers:
    """Who reads the pictures.

    Attributes:
        judges: read each of them.
        pairs: compare the erased model's with the base's.
        facts: of all of these, as metrics.json tells them, with the thresholds that were asked for.
    """

    judges: list[Judge]
    pairs: list[PairJudge]
    facts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Drawn:
    """What was drawn and is to be measured.

    Attributes:
        family: of the base.
        found: the checkpoint, or None where the base was drawn alone.
        vocabulary: of the model, or None.
        plans: manifests of the folders "base" and, with a checkpoint, "erased".
        split: which prompts ask for what was erased.
        readers: of the pictures.
    """

    family: Family
    found: Erased | None
    vocabulary: Vocabulary | None
    plans: dict[str, Manifest]
    split: Split
    readers: Readers


def main() -> None:
    """The command line."""
    run_program("evaluate", EvaluateConfig, evaluate)


def evaluate(config: EvaluateConfig) -> int:
    """Measures what `config` says; returns the exit code."""
    suites = {"emoji_canvas": evaluate_canvas, "attacks": evaluate_attacks}
    return suites.get(config.suite.name, evaluate_prompts)(config)


def evaluate_prompts(config: EvaluateConfig) -> int:
    """The suites `prompts` and `implicit`; returns the exit code."""
    part = ["limit"] if config.suite.name == "prompts" else []  # which decides the prompts of the suite implicit
    run = RunDirectory(config.run_path(), config, neutral=part)
    from esd import checkpoint
    from esd.evaluation.vocabulary import Vocabulary

    check(config.model)
    found = checkpoint.load(config.checkpoint) if config.checkpoint else None
    vocabulary = Vocabulary.load(config.model.path)
    rows = asked(config, found, vocabulary)
    share, device = find_share(config.device)
    readers = find_readers(config, rows, vocabulary, device, pairs=found is not None)
    split = split_of(found, vocabulary, readers.judges, rows)
    announce_drawing(config, rows, found)
    announce(f"read by {', '.join(readers.facts) or 'no judge'}")
    if config.suite.name == "prompts":
        warn_of_few(config, split, rows)
        warn_of_unknown(vocabulary, rows)
    if config.plan_only:
        announce(f"results would go to {run.path}; plan_only=true, so nothing was drawn")
        return 0
    family = load(config.model, device)
    check_pictures(readers.judges, rows, family)
    plans = plan(config, rows, family, found, run)
    share.wait()  # all have looked before the first one writes
    with run.claimed(main=share.index == 0):
        share.wait()
        start, missing = time.monotonic(), missing_images(config, plans)
        draw(config, plans, family, found, share)
        took = {"images_drawn": missing, "seconds": {"drawing": time.monotonic() - start}}
        if share.index == 0:
            measure(config, run, Drawn(family, found, vocabulary, plans, split, readers), took)
    announce(f"results are in {run.path}: metrics.json, images.csv, {', '.join(f'{name}/' for name in plans)}")
    return 0


def asked(config: EvaluateConfig, found: Erased | None, vocabulary: Vocabulary | None) -> list[PromptRow]:
    """The prompts that are drawn: those given, or those that ask in other ways for what was erased.

    Raises:
        UserError: see `rows_of`; or the model does not know what was erased, or has no judge.
    """
    if config.suite.name != "implicit":
        return limited(rows_of(config), config.limit)
    from esd.evaluation import implicit
    from esd.evaluation.judges import load_judge

    own = load_judge(config.model.path)
    split = split_of(found, vocabulary, [own] if own else [], [])
    targets = split.targets
    if vocabulary is None or not targets:
        raise UserError(f"suite=implicit: {split.reason}; ask with suite=prompts and a judge that knows it")
    rows = implicit.rows(vocabulary, targets, config.limit or EACH_WAY)
    if lacking := [way for way in implicit.WAYS if way not in {row.labels["way"] for row in rows}]:
        announce(f"the vocabulary has no words for {', '.join(lacking)} of {', '.join(t.name for t in targets)}")
    return rows


def find_readers(
    config: EvaluateConfig, rows: list[PromptRow], vocabulary: Vocabulary | None, device: Any, *, pairs: bool
) -> Readers:
    """The judges asked for, or the model's own; warns of those that were never tried on such pictures.

    Raises:
        UserError: see `esd.evaluation.judges_by_name.find` and `esd.evaluation.table.thresholds_of`; or pictures are to
            be compared with none, or a judge reads what no prompt says.
    """
    from esd.evaluation import table
    from esd.evaluation.implicit import JUDGES
    from esd.evaluation.judges import PairJudge, PromptJudge

    own = JUDGES if config.suite.name == "implicit" else own_judges(config, vocabulary)
    names = list(dict.fromkeys(config.judges or [*own, *(["ssim"] if pairs else [])]))
    judges: list[Judge] = []
    pair_judges: list[PairJudge] = []
    answers = answers_of(rows)
    for judge in find_named(names, config, rows, vocabulary, device):
        if isinstance(judge, PairJudge):
            pair_judges.append(judge)
        elif {*judge.unsure, *answers} & {*judge.questions} or isinstance(judge, PromptJudge):
            judges.append(judge)
        else:
            raise UserError(
                f"judges: {judge.name} reads {', '.join(judge.questions)}, and no prompt has such a label to hold it "
                f"against (labels: {', '.join(answers) or 'none'}); add a column of that name, or leave the judge out"
            )
    if pair_judges and not pairs:
        raise UserError(
            f"judges: {pair_judges[0].name} compares base and erased, and checkpoint=null draws the base alone; leave "
            "it out, or give a checkpoint"
        )
    readers: list[Judge | PairJudge] = [*judges, *pair_judges]
    facts = {judge.name: table.facts(judge) for judge in readers}
    for name, threshold in table.thresholds_of(facts, config.thresholds).items():
        facts[name]["threshold"] = threshold
    return Readers(judges, pair_judges, facts)


def split_of(found: Erased | None, vocabulary: Vocabulary | None, judges: list[Judge], rows: list[PromptRow]) -> Split:
    """Which of the prompts ask for what the checkpoint erased; see `esd.evaluation.split`."""
    from esd.evaluation.split import Split, split

    if found is None:
        return Split(None, [], None)
    concepts = found.provenance.get("concepts", [])
    origins = found.provenance.get("erase_from", [])[: len(concepts)]  # one for each, then again in other templates
    return split(concepts, origins, vocabulary, judges, answers_of(rows))


def warn_of_few(config: EvaluateConfig, split: Split, rows: list[PromptRow]) -> None:
    """Warns where so few pictures ask for what was erased that the rate of it would say little."""
    from esd.evaluation.metrics import wilson

    asking = split.asking([row.labels for row in rows])
    n, total = asking * config.images_per_prompt, len(rows) * config.images_per_prompt
    if not split.targets or n >= FEW:
        return
    target = split.targets[0]
    slots = {"thing": f"a {target.name} in the {{style}} style", "style": f"a {{thing}} in the {target.name} style"}
    more = f"such as {slots[target.domain]!r}" if target.domain in slots else f"of {target.domain} {target.name!r}"
    more = f"add prompts {more}{', without a limit' if config.limit else ''}"
    if n:
        most, samples = wilson(0, n)[1], -(-FEW // asking)
        told = (
            f"of which even none that shows it leaves up to {most:.0%} possible; {more}, or images_per_prompt={samples}"
        )
    else:
        told = f"so that there will be no rate of it; {more}"
    announce(f"{n} of {total} pictures are labelled as asking for {target.name!r}, {told}", warning=True)


def warn_of_unknown(vocabulary: Vocabulary | None, rows: list[PromptRow]) -> None:
    """Warns of things and styles that the model's own judge never answers with, so that they count as not shown."""
    from esd.evaluation.vocabulary import DOMAINS

    if vocabulary is None:
        return
    for domain in DOMAINS:
        asked, known = (row.labels.get(domain) for row in rows), vocabulary.names(domain)
        if unknown := [name for name in dict.fromkeys(asked) if name is not None and name not in known]:
            told = f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
            announce(f"prompts are labelled {domain}={told}, which the model's vocabulary.json lacks", warning=True)


def missing_images(config: EvaluateConfig, plans: dict[str, Manifest]) -> int:
    """How many of the planned images are to be drawn."""
    from esd.evaluation.generate import to_draw

    kept = Path(config.base_images) if config.base_images else None
    return sum(to_draw(manifest, kept) for manifest in plans.values())


def measure(config: EvaluateConfig, run: RunDirectory, drawn: Drawn, took: dict[str, Any]) -> None:
    """Writes images.csv and metrics.json, and prints the rates.

    Both are written once all is known, and an older metrics.json goes first, so that a run that is stopped in between
    reads as not finished, and never as the figures of other pictures.
    """
    from esd.evaluation import table
    from esd.evaluation.reading import read
    from esd.storage import write_json

    start = time.monotonic()
    found, plans, readers = drawn.found, drawn.plans, drawn.readers
    rows = read("base", plans["base"], readers.judges)
    if found:
        rows += read("erased", plans["erased"], readers.judges, readers.pairs, plans["base"])
    metrics: dict[str, Any] = {
        "suite": config.suite.name,
        "asked": config.asked(),
        "base": plans["base"].base,
        "checkpoint": found.identity() if found else None,
        "judges": readers.facts,
        "images": table.states(rows),
        "rates": table.rates(rows, readers.facts),
        "scores": table.scores(rows, readers.facts),
        "counts": table.counts(rows, readers.facts),
        **(what_went(config, drawn, rows) if found else {}),
        **denoiser(config, drawn),
    }
    took["seconds"]["judging"] = time.monotonic() - start
    (run / "metrics.json").unlink(missing_ok=True)
    table.write_table(run / "images.csv", rows)
    write_json(run / "metrics.json", metrics | took | {"peak_gib": peak_gib(drawn.family)})
    tell(metrics)


def what_went(config: EvaluateConfig, drawn: Drawn, rows: list[dict[str, str]]) -> dict[str, Any]:
    """What went and what stayed: "erasure" and "distances", or the "reason" and "distances_reason" why there are none.

    Where it was asked for in other ways, "erasure" is of the prompts that have a word for it, and "ways" of each way;
    else "harm" is what others of its kind lost.
    """
    from esd.evaluation import implicit
    from esd.evaluation.judges import FeatureJudge
    from esd.evaluation.reading import fid_and_kid

    split, facts, implied = drawn.split, drawn.readers.facts, config.suite.name == "implicit"
    told: dict[str, Any] = {"erasure": None, "reason": split.reason, "distances": None, "distances_reason": None}
    if implied and drawn.vocabulary:
        told["ways"] = implicit.rates(rows, facts, drawn.vocabulary)
        rows = [row for row in rows if row["label.way"] in implicit.BY_NAME]
    if (rates := split.rates(rows, facts)) and split.judge:
        told["erasure"] = {"judge": split.judge.name, "targets": [asdict(target) for target in split.targets]} | rates
    told["harm"] = None if implied else who_was_harmed(drawn, rows)
    reader = next((judge for judge in drawn.readers.judges if isinstance(judge, FeatureJudge)), None)
    if implied:
        told["distances_reason"] = "every prompt means what was erased"
    elif not split.targets:
        told["distances_reason"] = f"nothing tells which prompts ask for what was erased: {split.reason}"
    elif reader is None:
        told["distances_reason"] = "no judge asked has features; add one that has, such as clip:NAME"
    else:
        features = {"features": f"{reader.name} {reader.version} {reader.hash[:12]}"}
        known = [drawn.vocabulary.find(target.name) if drawn.vocabulary else None for target in split.targets]
        words = [word for found in known if found for word in found[1].synonyms]
        plans = drawn.plans
        apart = fid_and_kid(plans["base"], plans["erased"], reader.features, split.targets, words)
        told["distances"] = apart | features
    return told


def who_was_harmed(drawn: Drawn, rows: list[dict[str, str]]) -> dict[str, Any] | None:
    """What others of its kind lost, as a canvas tells it of an erasure.

    None where it was not one concept of a vocabulary, erased from all, or prompts ask for fewer than two others.
    """
    from esd.evaluation import canvas, retention

    judge, targets, vocabulary = drawn.split.judge, drawn.split.targets, drawn.vocabulary
    if judge is None or vocabulary is None or len(targets) != 1 or targets[0].within:
        return None
    (target,) = targets
    known = [row for row in rows if row.get(f"label.{target.domain}") in vocabulary.names(target.domain)]
    before, after = (
        canvas.counted([row for row in known if row["model"] == model], judge.name) for model in ("base", "erased")
    )
    names = list(dict.fromkeys([target.name, *before[target.domain]]))
    if len(names) < 3:
        return None
    likeness = retention.similarities(drawn.family, names)
    return {"name": target.name, "domain": target.domain} | retention.told(target, before, after, likeness)


def denoiser(config: EvaluateConfig, drawn: Drawn) -> dict[str, Any]:
    """What the denoiser says without a judge, or the reason why it is not asked."""
    if drawn.found is None:
        return {"denoiser": None, "denoiser_reason": "only the base was measured"}
    if config.interventions:
        return {"denoiser": None, "denoiser_reason": "it would be measured without the interventions of the pictures"}
    told = look_inside(config, drawn.family, drawn.found, drawn.vocabulary)
    return {"denoiser": told, "denoiser_reason": None if config.denoiser_points else "denoiser_points=0"}


def tell(metrics: dict[str, Any]) -> None:
    """Prints the rates, base beside erased; warns of images that could not be read."""
    from esd.evaluation import table
    from esd.evaluation.words import changes, span

    for model, lost in table.lost(metrics["images"]).items():
        announce_lost(model, lost)
    for model, judges in metrics["rates"].items():
        for judge, questions in judges.items():
            for question, rate in questions.items():
                if rate["n"]:
                    what = "as asked" if rate["of"] == "label" else rate["of"]
                    trust = span(rate["interval"], rate["n"])
                    print(f"{model:<14} {question} {rate['rate']:.1%} {what}  {trust}  {judge}")
    for line in changes([*(metrics.get("erasure") or {}).items(), *metrics.get("ways", {}).items()]):
        print(line)
    for what, reason in {"rates of what was erased": "reason", "FID and KID": "distances_reason"}.items():
        if told := metrics.get(reason):
            print(f"no {what}: {told}")
    if metrics["checkpoint"] and metrics["denoiser_reason"]:
        print(f"denoiser not looked into: {metrics['denoiser_reason']}")


if __name__ == "__main__":
    main()
