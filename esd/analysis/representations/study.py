"""How large representations are, channel by channel, and how far noise moves them, place by place and over time.

The pictures are the base's; with a checkpoint the erased model is shown the same ones. What is asked of each position:
is it as large while a picture is drawn as when the finished one is shown, are its channels of comparable size, where
does it depend on the noise, and what in other pictures is like a place in this one.
"""

from __future__ import annotations

from collections.abc import Sequence

from esd.analysis.begin import analysis
from esd.analysis.results import Results
from esd.analysis.subject import Subject

from . import measures, study_figures
from .extract import check_time, site_of, usual_positions


@analysis
def analyse(
    subject: Subject,
    results: Results,
    *,
    prompts: Sequence[str],
    positions: Sequence[str],
    noises: int,
    channel_steps: Sequence[int],
    histogram_step: int,
    map_step: int,
    spread_steps: Sequence[int],
) -> None:
    """Leaves six figures and their tables, of base and erased.

    Args:
        subject: the model.
        results: gets tables and figures.
        prompts: one picture each, each with its own seed.
        positions: see `extract`; none for `extract.usual_positions`.
        noises: that spread is taken over.
        channel_steps: training times of the channels' sizes.
        histogram_step: training time of the histogram.
        map_step: training time of maps of spread and of similarity.
        spread_steps: training times of the mean spread.

    Raises:
        UserError: no such position, or a time that there is not.
    """
    positions = positions or usual_positions(subject.family)
    for position in positions:
        site_of(subject.family, position)
    for step in (*channel_steps, histogram_step, map_step, *spread_steps):
        check_time(subject.family, step)
    seeds = subject.seeds(len(prompts))
    images = results.kept("pictures", lambda: subject.draw(prompts, seeds))
    study = measures.Study(subject, results, list(positions), images)
    levels = study.measured(lambda version: measures.levels(study, version, prompts, seeds))
    study_figures.show_levels(study, levels)
    times = sorted({*channel_steps, histogram_step})
    channels = study.measured(lambda version: measures.channels(study, version, times))
    study_figures.show_channels(study, channels, times, channel_steps, histogram_step)
    maps = study.measured(lambda version: measures.maps(study, version, map_step, noises))
    study_figures.show_maps(study, maps, map_step, noises)
    over_time = study.measured(lambda version: measures.over_time(study, version, spread_steps, noises))
    study_figures.show_over_time(study, over_time, spread_steps, noises)
    likeness = study.measured(lambda version: [measures.similar(study, version, map_step)])
    study_figures.show_similarity(study, likeness, map_step)
