"""The suite `attacks`: what attacks bring back of what a checkpoint erased.

    python -m esd.evaluate suite=attacks checkpoint=runs/cat run_dir=runs/cat-attacks

Leaves `metrics.json` (recovery against cost, for each attack on the erased model and on its base, each beside a
control), `recovery.png` (the curves), and pictures; the same command resumes after the last attack that was finished.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from esd.config.evaluate import EvaluateConfig, SuiteConfig
from esd.drawing import announce, announce_cuts, limited, refuse_several_processes, rows_of
from esd.errors import UserError
from esd.judging import check_pictures, find_named, own_judges
from esd.model import check, find_device, load
from esd.run import RunDirectory, versions

if TYPE_CHECKING:
    from esd.checkpoint import Erased
    from esd.evaluation.attacks import Attack
    from esd.evaluation.judges import Judge
    from esd.evaluation.prompts import PromptRow
    from esd.evaluation.vocabulary import Vocabulary

PROMPTS = 16  # that ask for the concept, unless limit or prompts say otherwise


def evaluate_attacks(config: EvaluateConfig) -> int:
    """The suite `attacks`; returns the exit code."""
    run = RunDirectory(config.run_path(), config, unused=config.unused())
    from esd import checkpoint
    from esd.evaluation.attacks import Budget, ConceptScorer
    from esd.evaluation.attacks.suite import attack_checkpoint
    from esd.evaluation.erasure import DrawSettings
    from esd.evaluation.vocabulary import Vocabulary

    refuse_several_processes(config)
    check(config.model)
    found = checkpoint.load(str(config.checkpoint))
    vocabulary = Vocabulary.load(config.model.path)
    concept = concept_of(config.suite, found, vocabulary)
    attacks = chosen(config.suite, concept)
    rows = asking(config, concept, found, vocabulary)
    device = find_device(config.device)
    judge, threshold = find_judge(config, rows, vocabulary, device)
    known = vocabulary.find(concept) if vocabulary else None
    words = known[1].synonyms if known else ()
    scorer = ConceptScorer.of_rows(judge, rows, threshold, concept=concept, synonyms=words)
    names = ", ".join(attack.name for attack in attacks)
    announce(f"attack {found.path} with {names}, on {len(rows)} prompts such as {rows[0].prompt!r}")
    announce(f"read by {scorer.name}{'' if scorer.answer else f', which is not asked about {concept}'}")
    if config.plan_only:
        announce(f"results would go to {run.path}; plan_only=true, so nothing was attacked")
        return 0
    family = load(config.model, device)
    draw = DrawSettings(config.num_steps, config.guidance_scale, config.batch_size)
    check_pictures([judge], rows, family)
    announce_cuts(family.cut([row.prompt for row in rows]))
    attack_checkpoint(
        family, found, attacks, rows, Budget(**asdict(config.suite.budget)), scorer=scorer, draw_settings=draw,
        folder=run.path, seed=config.seed, versions=versions(), claim=run.claimed(), report=announce,
    )  # fmt: skip
    announce(f"results are in {run.path}: metrics.json, recovery.png, {names} (pictures)")
    return 0


def concept_of(suite: SuiteConfig, found: Erased, vocabulary: Vocabulary | None) -> str:
    """What is to be brought back, by the model's own name for it where it has one.

    Raises:
        UserError: the checkpoint erased several concepts, or does not say which.
    """
    erased = found.provenance.get("concepts") or []
    if not suite.concept and len(erased) != 1:
        raise UserError(
            f"suite.concept=null, and {found.path} erased {', '.join(erased) or 'what it does not say'}; name one, "
            f"such as suite.concept={erased[0] if erased else 'cat'}"
        )
    concept = suite.concept or erased[0]
    known = vocabulary.find(concept) if vocabulary else None
    return known[1].name if known else concept


def chosen(suite: SuiteConfig, concept: str) -> list[Attack]:
    """The attacks with their settings; a learned word takes the place of the concept's, unless told otherwise.

    Raises:
        UserError: see `esd.evaluation.attacks.make`.
    """
    from esd.evaluation.attacks import make

    settings = {name: dict((suite.settings or {}).get(name) or {}) for name in suite.attacks}
    if "inversion" in settings:
        settings["inversion"].setdefault("concept", concept)
    return [make(name, told) for name, told in settings.items()]


def asking(config: EvaluateConfig, concept: str, found: Erased, vocabulary: Vocabulary | None) -> list[PromptRow]:
    """The prompts given; or, of a model with a vocabulary, those of its evaluation that ask for the concept.

    Where it was erased from one thing or style only, they ask for it there.

    Raises:
        UserError: none are given, and the model has no words for the concept.
    """
    if config.prompts is not None:
        return limited(rows_of(config), config.limit)
    from esd.evaluation.erasure import exam

    told = found.provenance
    erased, origins = told.get("concepts") or [], told.get("erase_from") or []
    every = vocabulary.targets(erased, origins[: len(erased)]) if vocabulary else []
    targets = [target for target in every if target.name == concept]
    if vocabulary and not targets:  # not what the checkpoint says it erased, but asked for
        targets = vocabulary.targets([concept])
    if vocabulary is None or not targets:
        raise UserError(
            f"prompts=null, and {config.model.path} has no vocabulary.json that knows {concept!r}; give prompts that "
            "all ask for it"
        )
    return exam(vocabulary, targets, config.limit or PROMPTS, 0, 0)


def find_judge(
    config: EvaluateConfig, rows: list[PromptRow], vocabulary: Vocabulary | None, device: str
) -> tuple[Judge, float | None]:
    """The one judge that reads attacks, and the threshold that it is given.

    Raises:
        UserError: several judges or none, or one of pairs; see `esd.evaluation.judges_by_name.find`.
    """
    from esd.evaluation import table
    from esd.evaluation.judges import PairJudge

    names = config.judges or own_judges(config, vocabulary)[:1]
    judge, *others = [*find_named(names, config, rows, vocabulary, device), None]
    if judge is None or isinstance(judge, PairJudge) or len(others) > 1:
        raise UserError(
            f"judges={config.judges}: attacks are read by one judge of single pictures; give one, such as "
            "judges=[resnet50]"
        )
    least = table.thresholds_of({judge.name: table.facts(judge)}, config.thresholds)
    return judge, least.get(judge.name)
