"""Measure an erased checkpoint.

    python -m esd.evaluate checkpoint=runs/cat prompts='["a {thing} in the {style} style"]' limit=100

`suite=prompts` draws a set of prompts with the base and with the erased model from the same seeds, and has judges read
the pictures. Leaves `base/` and `erased/` (images and manifests), `images.csv` (a row for every image and model, with
all that was read and how sure) and `metrics.json` (rates with intervals, distances, what it took). The same command
resumes; `accelerate launch -m esd.evaluate` shares the drawing out. `suite=implicit` finds its own prompts: what was
erased, asked for in other ways.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from esd.attacks import evaluate_attacks
from esd.canvas import evaluate_canvas
from esd.config.evaluate import EvaluateConfig
from esd.drawing import announce, announce_drawing, draw, find_share, limited, look_inside, most_held_gib, plan, rows_of
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
    from esd.evaluation.vocabulary import Target, Vocabulary
    from esd.families import Family

EACH_WAY = 40  # prompts of each way to ask, unless limit says otherwise


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
    from esd.evaluation import table
    from esd.evaluation.vocabulary import Vocabulary

    check(config.model)
    found = checkpoint.load(config.checkpoint) if config.checkpoint else None
    vocabulary = Vocabulary.load(config.model.path)
    rows = asked(config, found, vocabulary)
    share, device = find_share(config.device)
    judges, pair_judges = find_judges(config, rows, vocabulary, device, pairs=found is not None)
    readers: list[Judge | PairJudge] = [*judges, *pair_judges]
    facts = {judge.name: table.facts(judge) for judge in readers}
    for name, threshold in table.thresholds_of(facts, config.thresholds).items():
        facts[name]["threshold"] = threshold
    announce_drawing(config, rows, found)
    announce(f"read by {', '.join(facts) or 'no judge'}")
    if config.plan_only:
        announce(f"results would go to {run.path}; plan_only=true, so nothing was drawn")
        return 0
    family = load(config.model, device)
    check_pictures(judges, rows, family)
    plans = plan(config, rows, family, found, run)
    share.wait()  # all have looked before the first one writes
    with run.claimed(main=share.index == 0):
        share.wait()
        start, missing = time.monotonic(), missing_images(plans)
        draw(config, plans, family, found, share)
        took = {"images_drawn": missing, "seconds": {"drawing": time.monotonic() - start}}
        if share.index == 0:
            measure(config, run, family, found, vocabulary, plans, judges, pair_judges, facts, took)
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

    targets, reason = targets_of(found, vocabulary, load_judge(config.model.path)) if found else ([], None)
    if vocabulary is None or not targets:
        raise UserError(
            f"suite=implicit: {reason or 'the checkpoint does not say what it erased'}; ask with suite=prompts and a "
            "judge that knows it"
        )
    rows = implicit.rows(vocabulary, targets, config.limit or EACH_WAY)
    if lacking := [way for way in implicit.WAYS if way not in {row.labels["way"] for row in rows}]:
        announce(f"the vocabulary has no words for {', '.join(lacking)} of {', '.join(t.name for t in targets)}")
    return rows


def find_judges(
    config: EvaluateConfig, rows: list[PromptRow], vocabulary: Vocabulary | None, device: Any, *, pairs: bool
) -> tuple[list[Judge], list[PairJudge]]:
    """The judges asked for, or the model's own; warns of those that were never tried on such pictures.

    Raises:
        UserError: see `esd.evaluation.judges_by_name.find`; or pictures are to be compared with none, or a judge reads
            what no prompt says.
    """
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
    return judges, pair_judges


def missing_images(plans: dict[str, Manifest]) -> int:
    """How many of the planned images are not there yet."""
    return sum(not (manifest.folder / i.file).exists() for manifest in plans.values() for i in manifest.images)


def measure(
    config: EvaluateConfig,
    run: RunDirectory,
    family: Family,
    found: Erased | None,
    vocabulary: Vocabulary | None,
    plans: dict[str, Manifest],
    judges: list[Judge],
    pair_judges: list[PairJudge],
    facts: dict[str, dict[str, Any]],
    took: dict[str, Any],
) -> None:
    """Writes images.csv and metrics.json, and prints the rates."""
    from esd.evaluation import table
    from esd.evaluation.reading import read
    from esd.storage import write_json

    start = time.monotonic()
    rows = read("base", plans["base"], judges)
    if found:
        rows += read("erased", plans["erased"], judges, pair_judges, plans["base"])
    table.write_table(run / "images.csv", rows)
    metrics: dict[str, Any] = {
        "suite": config.suite.name,
        "limit": config.limit,
        "base": plans["base"].base,
        "checkpoint": found.identity() if found else None,
        "judges": facts,
        "images": table.states(rows),
        "rates": table.rates(rows, facts),
        "scores": table.scores(rows, facts),
        "counts": table.counts(rows, facts),
        **(compare(config, found, vocabulary, plans, judges, rows, facts) if found else {}),
        "denoiser": look_inside(config, family, found, vocabulary) if found else None,
    }
    took["seconds"]["judging"] = time.monotonic() - start
    write_json(run / "metrics.json", metrics | took | {"peak_gib": peak_gib(family)})
    tell(metrics)


def targets_of(found: Erased, vocabulary: Vocabulary | None, judge: Judge | None) -> tuple[list[Target], str | None]:
    """(what was erased in the model's words, None), or ([], why no rate can be had)."""
    from esd.evaluation.erasure import known_targets

    concepts = found.provenance.get("concepts", [])
    origins = found.provenance.get("erase_from", [])[: len(concepts)]  # one for each, then again in other templates
    return known_targets(concepts, vocabulary, judge, origins)


def compare(
    config: EvaluateConfig,
    found: Erased,
    vocabulary: Vocabulary | None,
    plans: dict[str, Manifest],
    judges: list[Judge],
    rows: list[dict[str, str]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """What went and what stayed: "erasure" or the "reason" why it cannot be told, and "distances".

    Where it was asked for in other ways, "erasure" is of the prompts that have a word for it, and "ways" of each way.
    """
    from esd.evaluation import implicit, table
    from esd.evaluation.judges import EmojiJudge
    from esd.evaluation.reading import fid_and_kid
    from esd.evaluation.vocabulary import DOMAINS

    judge = next((judge for judge in judges if set(DOMAINS) <= set(judge.questions)), None)
    targets, reason = targets_of(found, vocabulary, judge)
    told: dict[str, Any] = {"erasure": None, "reason": reason, "distances": None}
    implied = config.suite.name == "implicit"
    if implied and vocabulary:
        told["ways"] = implicit.rates(rows, facts, vocabulary)
        rows = [row for row in rows if row["label.way"] in implicit.BY_NAME]
    if judge and targets:
        threshold = facts[judge.name]["threshold"] or 0.0
        known = {"judge": judge.name, "targets": [asdict(target) for target in targets]}
        told["erasure"] = known | table.erasure(rows, judge.name, threshold, targets)
    if isinstance(judge, EmojiJudge) and not implied:  # of which every prompt means what was erased
        features = {"features": f"{judge.name} {judge.version} {judge.hash[:12]}"}
        told["distances"] = fid_and_kid(plans["base"], plans["erased"], judge.features, targets) | features
    return told


def peak_gib(family: Family) -> dict[str, float]:
    """Most memory that this process held so far, in GiB: of the machine, and of the GPU where one draws."""
    import torch

    told: dict[str, float] = {"process": held} if (held := most_held_gib()) else {}
    if family.device.type == "cuda":
        told["gpu"] = torch.cuda.max_memory_allocated(family.device) / 2**30
    return told


def tell(metrics: dict[str, Any]) -> None:
    """Prints the rates, base beside erased; warns of images that could not be read."""
    for model, found in metrics["images"].items():
        if lost := ", ".join(f"{n} {state}" for state, n in found.items() if n and state != "ok"):
            announce(
                f"images of {model}: {lost}; they count in no rate; remove what is corrupt, and the same command draws "
                "it anew",
                warning=True,
            )
    for model, judges in metrics["rates"].items():
        for judge, questions in judges.items():
            for question, rate in questions.items():
                if rate["n"]:
                    what = "as asked" if rate["of"] == "label" else rate["of"]
                    print(f"{model:<14} {question} {rate['rate']:.1%} {what}  {span(rate)}  {judge}")
    for name, rate in [*(metrics.get("erasure") or {}).items(), *metrics.get("ways", {}).items()]:
        if isinstance(rate, dict) and rate["n"]:
            print(f"{name:<14} {rate['before']:.1%} -> {rate['after']:.1%}  {span(rate)}")
    if metrics.get("reason"):
        print(f"no rates of what was erased: {metrics['reason']}")


def span(rate: dict[str, Any]) -> str:
    """A rate's interval and number, as it is printed."""
    low, high = rate["interval"]
    return f"(95%: {low:.1%} to {high:.1%}, n={rate['n']})"


if __name__ == "__main__":
    main()
