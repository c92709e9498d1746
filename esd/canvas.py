"""The suite `emoji_canvas`: erase one thing or style after the other, read the whole grid each time.

    python -m esd.evaluate suite=emoji_canvas method=esd_u run_dir=runs/canvas-esd-u

Each erasure is a run of `esd.train` in `thing-NAME/training` or `style-NAME/training`, as a user would start it. Its
pictures of the grid lie in `erased` beside that, those of the base in `base`. `images.csv` has a row for every picture,
`metrics.json` the scores of every erasure and their means, `canvas.csv` a line for each erasure; all three are written
anew after each one, once all are told again that stood there before. The same command goes on where it was stopped.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd.config.evaluate import EvaluateConfig
from esd.drawing import announce_lost, look_inside, refuse_several_processes
from esd.errors import UserError
from esd.judging import check_pictures
from esd.main import EXIT_SIGNAL
from esd.model import check, find_device, load
from esd.run import RunDirectory, versions

if TYPE_CHECKING:
    from esd.evaluation.generate import Manifest
    from esd.evaluation.judges import EmojiJudge
    from esd.evaluation.prompts import PromptRow
    from esd.evaluation.table import Row
    from esd.evaluation.vocabulary import Target, Vocabulary
    from esd.families import Family

EXPERIMENTS = {"thing": "erase_thing", "style": "erase_style"}  # whose prompts fit what is erased
UNREAD = ("target_images", "retained_images", "implied_images")  # of esd.train: the canvas reads, not the training


def evaluate_canvas(config: EvaluateConfig) -> int:
    """Erases and reads; returns the exit code.

    Raises:
        UserError: the model has no vocabulary or no judge, or does not know a name of the canvas.
    """
    run = RunDirectory(config.run_path(), config, neutral=["limit"])
    from esd.evaluation import canvas
    from esd.evaluation.erasure import FIRST_SEED

    refuse_several_processes(config)
    check(config.model)
    vocabulary, judge = known(config)
    things, styles = (named(config, vocabulary, domain) for domain in ("thing", "style"))
    template = vocabulary.phrasings["held_out"]["both"][0]
    rows = canvas.grid(template, things, styles, seed=FIRST_SEED + config.seed, samples=config.images_per_prompt)
    targets = canvas.order(things, styles)[: config.limit]
    pictures = len(rows) * config.images_per_prompt
    print(
        f"erase {len(targets)} of {len(things)} things and {len(styles)} styles in turn by {config.method.name} "
        f"({config.method.summary()}), and read {pictures} pictures each time\n"
        f"read by {judge.name}; a picture is {template!r}",
        flush=True,
    )
    if config.plan_only:
        print(f"results would go to {run.path}; plan_only=true, so nothing was trained")
        return 0
    family = load(config.model, find_device(config.device))
    family.scheduler(config.num_steps)  # tells whether it knows so many
    check_pictures([judge], rows, family)
    whole = Canvas(config, run, family, vocabulary, judge, rows)
    if code := whole.refuse(targets):
        return code
    with run.claimed():
        return whole.measure(targets)


def known(config: EvaluateConfig) -> tuple[Vocabulary, EmojiJudge]:
    """The model's vocabulary and its judge.

    Raises:
        UserError: it has none.
    """
    from esd.evaluation.judges_by_name import find
    from esd.evaluation.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(config.model.path)
    if vocabulary is None:
        raise UserError(
            f"model.path={config.model.path} ships no vocabulary.json, so that the canvas does not know what to erase; "
            "allowed: a model that does, such as checkpoints/emoji-sd"
        )
    judge: Any = find("emoji-judge", model=config.model.path, vocabulary=vocabulary, labels={})
    return vocabulary, judge


def named(config: EvaluateConfig, vocabulary: Vocabulary, domain: str) -> list[str]:
    """The things or styles of the canvas.

    Raises:
        UserError: the model does not know one, it stands there twice, or there is no other.
    """
    asked: list[str] = config.suite.things if domain == "thing" else config.suite.styles
    known = vocabulary.names(domain)
    for name in asked:
        if name not in known or asked.count(name) > 1:
            why = "stands there twice" if name in known else "is not known to the model"
            raise UserError(f"suite.{domain}s: {name!r} {why}; allowed: {', '.join(known)}")
    chosen = asked or known
    if len(chosen) < 2:
        raise UserError(
            f"suite.{domain}s={chosen}: of one there are no others that an erasure could leave; allowed: two or more"
        )
    return chosen


def quoted(text: str) -> str:
    """A text as Hydra reads it back, whatever it holds."""
    return "'" + text.replace("'", "\\'") + "'"


def exit_code(returned: int) -> int:
    """The exit code of a process as a shell tells it: one that a signal ended returns the signal's number, negative."""
    return returned if returned >= 0 else EXIT_SIGNAL - returned


def settings_of(config: EvaluateConfig, target: Target, folder: Path) -> list[str]:
    """What esd.train is told to erase a target, as a user would; the run directory is `training` in the folder."""
    return [
        f"experiment={EXPERIMENTS[target.domain]}",
        f"concepts=[{quoted(target.name)}]",
        *config.method.training,
        *(config.method.styles if target.domain == "style" else ()),
        *(f"evaluation.{name}=0" for name in UNREAD),
        "evaluation.preview_images=1",
        *(f"evaluation.{name}={getattr(config, name)}" for name in ("num_steps", "guidance_scale")),
        f"model.path={quoted(config.model.path)}",
        f"model.precision={config.model.precision}",
        f"device={config.device}",
        f"seed={config.seed}",
        f"run_dir={quoted(str(folder / 'training'))}",
    ]


class Canvas:
    """One method's canvas in one run directory."""

    def __init__(
        self,
        config: EvaluateConfig,
        run: RunDirectory,
        family: Family,
        vocabulary: Vocabulary,
        judge: EmojiJudge,
        rows: list[PromptRow],
    ) -> None:
        self.config, self.run, self.family, self.vocabulary, self.judge = config, run, family, vocabulary, judge
        self.rows = rows

    def refuse(self, targets: list[Target]) -> int:
        """Looks for what the canvas would end at, and writes nothing; returns the exit code.

        Raises:
            UserError: pictures that are there are of another base or other weights.
        """
        self.planned(self.run / "base", None)
        for target in filter(self.trained, targets):
            self.planned(self.folder(target) / "erased", self.folder(target) / "training")
        left = {target.domain: target for target in targets if not self.trained(target)}  # one of each is enough
        for target in left.values():
            settings = settings_of(self.config, target, self.folder(target))
            command = [sys.executable, "-m", "esd.train", *settings, "plan_only=true"]
            if code := exit_code(subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode):
                return code
        return 0

    def measure(self, targets: list[Target]) -> int:
        """Erases each target and reads the grid; returns the exit code."""
        from esd.evaluation import canvas, retention

        base = self.drawn(self.run / "base", None)
        table = self.read("base", base)
        counts = {"base": canvas.counted(table, self.judge.name)}
        names = {domain: list(found) for domain, found in counts["base"].items()}
        likeness = {domain: retention.similarities(self.family, found) for domain, found in names.items()}
        erasures: list[dict[str, Any]] = []
        before = self.told_before() & {(target.domain, target.name) for target in targets}
        for number, target in enumerate(targets, 1):
            print(f"{number} of {len(targets)}: {target.name}", flush=True)
            folder = self.folder(target)
            if code := 0 if self.trained(target) else self.train(target):
                return code
            erased = self.drawn(folder / "erased", folder / "training")
            read = self.read(target.name, erased)
            table += read
            after = canvas.counted(read, self.judge.name)
            erasures.append(self.told(target, folder, base, erased, counts["base"], after, likeness[target.domain]))
            if before <= {(told["domain"], told["name"]) for told in erasures}:
                self.write(table, erasures, len(targets))
        print(f"results are in {self.run.path}: metrics.json, canvas.csv, images.csv")
        return 0

    def told_before(self) -> set[tuple[str, str]]:
        """(domain, name) of the erasures that metrics.json tells of."""
        try:
            told = json.loads((self.run / "metrics.json").read_text(encoding="utf-8"))
            return {(erasure["domain"], erasure["name"]) for erasure in told["erasures"]}
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def folder(self, target: Target) -> Path:
        """Where an erasure lies."""
        return self.run / f"{target.domain}-{target.name.replace(' ', '-')}"

    def trained(self, target: Target) -> bool:
        """Whether an erasure is made."""
        from esd.checkpoint import FILE_NAME

        return all((self.folder(target) / "training" / name).is_file() for name in ("summary.json", FILE_NAME))

    def train(self, target: Target) -> int:
        """Makes one erasure; returns the exit code."""
        from esd.progress import termination

        settings = settings_of(self.config, target, self.folder(target))
        print(f"python -m esd.train {shlex.join(settings)}", flush=True)
        with termination() as stopping, subprocess.Popen([sys.executable, "-m", "esd.train", *settings]) as training:
            while training.poll() is None:
                if stopping():
                    training.terminate()
                    training.wait()
                try:
                    training.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        if code := exit_code(training.returncode):
            print(f"the training of {target.name} ended with code {code}; the same command goes on", file=sys.stderr)
        return code

    def planned(self, folder: Path, weights: Path | None) -> Manifest:
        """What the pictures of the grid are.

        Raises:
            UserError: those in the folder are others.
        """
        from esd import checkpoint
        from esd.evaluation import generate

        found = checkpoint.load(weights) if weights else None
        return generate.plan(
            self.rows,
            folder,
            base=generate.base_of(self.family),
            num_steps=self.config.num_steps,
            guidance_scale=self.config.guidance_scale,
            images_per_prompt=self.config.images_per_prompt,
            checkpoint=found.path if found else None,
            drawn_with=versions() | {"device": self.family.device.type},
        )

    def drawn(self, folder: Path, weights: Path | None) -> Manifest:
        """The pictures of the grid, drawn unless they are there."""
        from esd import checkpoint
        from esd.evaluation import generate

        found, planned = checkpoint.load(weights) if weights else None, self.planned(folder, weights)
        kept = Path(self.config.base_images) if self.config.base_images and not found else None
        with self.family.drawing() as pipe:
            if found is None:
                return generate.generate(pipe, planned, batch_size=self.config.batch_size, kept=kept)
            with checkpoint.erased(pipe, found):
                return generate.generate(pipe, planned, batch_size=self.config.batch_size)

    def read(self, model: str, manifest: Manifest) -> list[Row]:
        """The rows of images.csv of one model; warns of pictures that are not there."""
        from esd.evaluation import table
        from esd.evaluation.reading import read

        where = manifest.folder.relative_to(self.run.path)
        rows = [row | {"file": str(where / Path(row["file"]).name)} for row in read(model, manifest, [self.judge])]
        for lost in table.lost(table.states(rows)).values():
            first = next(row["file"] for row in rows if row["state"] != "ok")
            announce_lost(model, f"{lost}, the first {first}")
        return rows

    def told(
        self,
        target: Target,
        folder: Path,
        base: Manifest,
        erased: Manifest,
        before: Any,
        after: Any,
        likeness: Any,
    ) -> dict[str, Any]:
        """What metrics.json says of one erasure."""
        from esd import checkpoint
        from esd.evaluation import canvas, retention
        from esd.evaluation.reading import fid_and_kid

        found = checkpoint.load(folder / "training")
        apart = fid_and_kid(base, erased, self.judge.features, [target])
        return {
            "name": target.name,
            "domain": target.domain,
            **canvas.scores(target, before, after),
            **{name: apart[name] for name in ("fid", "kid")},
            **retention.told(target, before, after, likeness),
            "denoiser": look_inside(self.config, self.family, found, self.vocabulary),
            "seconds": found.provenance["seconds"],
            "peak_gib": found.provenance.get("peak_gib"),  # which earlier versions did not tell
            "parameters": found.provenance["parameters"],
            "bytes": found.path.stat().st_size,
        }

    def write(self, rows: list[Row], erasures: list[dict[str, Any]], planned: int) -> None:
        """Writes images.csv, metrics.json and canvas.csv, and prints the means so far."""
        from esd.evaluation import canvas, table
        from esd.evaluation.vocabulary import DOMAINS
        from esd.storage import write_json

        by_domain = {domain: [told for told in erasures if told["domain"] == domain] for domain in DOMAINS}
        means = {domain: canvas.mean(told) for domain, told in by_domain.items() if told}
        table.write_table(self.run / "images.csv", rows)
        write_json(
            self.run / "metrics.json",
            {
                "suite": self.config.suite.name,
                "method": {name: value for name, value in asdict(self.config.method).items() if value},
                "judges": {self.judge.name: table.facts(self.judge)},
                "planned": planned,
                "asked": self.config.asked(),
                "images": table.states(rows),
                "erasures": erasures,
                "means": means,
                "published": canvas.PUBLISHED,
            },
        )
        self.write_lines(erasures)
        for domain, mean in means.items():
            print(f"{domain}s, mean of {len(by_domain[domain])} erasures:", flush=True)
            for name, told in mean.items():
                own = spanned(told["rate"], told["interval"], told["erasures"])
                share = spanned(told["of_base"], told["of_base_interval"], told["of_base_erasures"])
                print(f"    {name:<4}{own}, of the base's {share}", flush=True)

    def write_lines(self, erasures: list[dict[str, Any]]) -> None:
        """Writes canvas.csv: a line for each erasure."""
        from esd.evaluation.canvas import SCORES
        from esd.evaluation.foretold import INSIDE, inside
        from esd.storage import atomic

        plain = ("name", "domain", "fid", "kid", "over_erasure", "seconds", "parameters", "bytes")
        lines = [
            {name: told[name] for name in plain}
            | {name: inside(told["denoiser"]).get(name) for name in INSIDE}
            | {f"peak_gib_{what}": (told["peak_gib"] or {}).get(what) for what in ("process", "gpu")}
            | {f"{score}{suffix}": told[score][field] for score in SCORES for suffix, field in FIELDS.items()}
            | {
                f"{score}{suffix}_{end}": value
                for score in SCORES
                for suffix, field in INTERVALS.items()
                for end, value in zip(ENDS, told[score][field] or (None, None), strict=True)
            }
            for told in erasures
        ]
        with atomic(self.run / "canvas.csv") as staged, staged.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


def spanned(value: float | None, interval: Sequence[float] | None, n: int) -> str:
    """A mean with its interval and the number of erasures behind it, as it is printed."""
    from esd.evaluation.words import span

    return "unknown" if value is None or interval is None else f"{value:.1%} {span(interval, n)}"


FIELDS = {"": "rate", "_n": "n", "_base": "base", "_n_base": "n_base", "_of_base": "of_base"}
INTERVALS = {"": "interval", "_of_base": "of_base_interval"}
ENDS = ("low", "high")
