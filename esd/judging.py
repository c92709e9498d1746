"""The judges that a setting names: found, warned of, and held against the pictures they would get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esd.config.evaluate import EvaluateConfig
from esd.drawing import announce
from esd.errors import UserError

if TYPE_CHECKING:
    from esd.evaluation.judges import Judge, PairJudge
    from esd.evaluation.prompts import PromptRow
    from esd.evaluation.vocabulary import Vocabulary
    from esd.families import Family


def own_judges(config: EvaluateConfig, vocabulary: Vocabulary | None) -> list[str]:
    """The names of the judges that come with the model."""
    from esd.evaluation.judges import load_judge

    return ["emoji-judge", "emoji-clip"] if vocabulary and load_judge(config.model.path) else []


def answers_of(rows: Sequence[PromptRow]) -> dict[str, list[str]]:
    """The labels of the prompts, each with the values that it has."""
    answers: dict[str, dict[str, None]] = {}
    for row in rows:
        for label, value in row.labels.items():
            answers.setdefault(label, {})[value] = None
    return {label: list(values) for label, values in answers.items()}


def find_named(
    names: Sequence[str], config: EvaluateConfig, rows: Sequence[PromptRow], vocabulary: Vocabulary | None, device: Any
) -> list[Judge | PairJudge]:
    """The judges of these names; warns of those that were never tried on such pictures.

    Raises:
        UserError: see `esd.evaluation.judges_by_name.find`.
    """
    import transformers

    from esd.evaluation.judges import EMOJI, PHOTOS, PairJudge
    from esd.evaluation.judges_by_name import find

    transformers.utils.logging.disable_progress_bar()  # loading takes a second
    pictures = EMOJI if own_judges(config, vocabulary) else PHOTOS
    found = []
    for name in names:
        judge = find(name, model=config.model.path, vocabulary=vocabulary, labels=answers_of(rows), device=device)
        found.append(judge)
        if not isinstance(judge, PairJudge) and judge.validated != pictures:
            told = f"{name} was validated on {judge.validated}, never on {pictures}; its rates may mean nothing"
            announce(told, warning=True)
    return found


def check_pictures(judges: Sequence[Judge], rows: Sequence[PromptRow], family: Family) -> None:
    """Raises UserError where a judge would get pictures of a size that it does not read."""
    for judge in judges:
        if (size := judge.size) is None:
            continue
        odd = next((row for row in rows if (row.height or size, row.width or size) != (size, size)), None)
        if odd or family.latent_shape(size) != family.sample_shape:
            which = f"case_number {odd.case_number} is" if odd else "the model's pictures are"
            raise UserError(f"judges: {judge.name} reads pictures of {size} pixels, and {which} not; leave it out")
