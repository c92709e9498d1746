"""A run directory: what a run was asked to do, what it left, and whether it may be written to at all.

    config.yaml           the resolved settings, the command and the versions: enough to do it again
    metrics.jsonl         one line per update
    erased.safetensors    float32 differences from the base, with provenance
    preview.png           base and erased side by side
    summary.json          rates before and after, as the judge reads them
    state/                resumable training state; gone once training is done
    .lock                 held by the process at work; an empty file

The same settings resume a run; other settings are refused, so that no directory ever mixes two runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from esd.config.paths import slug
from esd.config.train_sections import TrackerConfig
from esd.errors import UserError

# Settings that change neither the images nor the weights a run makes, or that are compared on their own, as the number
# of processes is with the training state.
NEUTRAL = (
    *("plan_only", "device", "device_memory", "run_dir", "tracker", "evaluation", "batch_size"),
    *("training.save_every", "training.processes", "base_images", "judges", "thresholds", "denoiser_points"),
)
LOCK = ".lock"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Version of esd, Python and what the numbers depend on."""
    from esd import __version__

    found = {"esd": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


class RunDirectory:
    """One run's directory. Making the object only looks; `claimed` is the first to write.

    Args:
        path: of the directory, which may not exist yet.
        config: the run's configuration dataclass, already checked.
        unused: dotted names of settings that say nothing to this run, such as another analysis' own: they are neither
            written nor compared, so that their defaults may change.
        neutral: dotted names of settings that may differ, besides `NEUTRAL`.

    Raises:
        UserError: the directory holds another run or other files, or cannot be written to.
    """

    def __init__(self, path: Path, config: Any, *, unused: Collection[str] = (), neutral: Collection[str] = ()) -> None:
        self.path = path
        self.program = type(config).__name__.removesuffix("Config").lower()
        self.unused, self.neutral = unused, {*NEUTRAL, *neutral}
        self.settings = _without(dataclasses.asdict(config), unused)
        self.defaults = _without(dataclasses.asdict(type(config)()), unused)
        self.stored = self._stored()
        self._check()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def unmeasured(self, facts: Mapping[str, Any]) -> str:
        """Why summary.json does not answer an evaluation with these facts: what differs; empty where it does."""
        try:
            told = json.loads((self / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            told = None
        if not isinstance(told, dict):
            return "there is no summary.json"
        return next(filter(None, (_difference(name, told.get(name), facts[name]) for name in facts)), "")

    @contextmanager
    def claimed(self, *, main: bool = True) -> Iterator[None]:
        """Keeps other launches out of the directory for the length of a `with` block, and writes config.yaml.

        Settings that are refused before anything came of them leave no config.yaml: mended ones may be given here.

        Args:
            main: False in all processes of a launch but one: they share what that one holds.

        Raises:
            UserError: another process is at work there, or another run has been since; it cannot be written to.
        """
        from esd.storage import lock

        if not main:
            yield
            return
        with ExitStack() as held:
            try:
                if not held.enter_context(lock(self / LOCK)):
                    raise UserError(
                        f"run_dir={self.path}: another process is at work there; wait for it, or choose another run_dir"
                    )
                self.stored = self._stored()
                self._check()
                self._write_settings()
            except OSError as error:
                raise UserError(
                    f"run_dir={self.path} cannot be written to ({error.strerror}); choose another run_dir"
                ) from error
            try:
                yield
            except UserError:
                if self.stored is None and all(
                    _ours(path) or path.name == "config.yaml" for path in self.path.iterdir()
                ):
                    (self / "config.yaml").unlink()
                raise

    def _write_settings(self) -> None:
        """Writes config.yaml."""
        from esd.storage import atomic

        with atomic(self / "config.yaml") as staged:
            head = [
                f"# python -m esd.{self.program} {shlex.join(_typed())}".encode("unicode_escape").decode(),
                "# " + ", ".join(f"{name} {number}" for name, number in versions().items()),
            ]
            body = yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
            staged.write_text("\n".join([*head, body]), encoding="utf-8")

    def _stored(self) -> dict[str, Any] | None:
        """The settings of the run that is here already, or None."""
        try:
            told = yaml.safe_load((self / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return None
        return _without(told, self.unused) if isinstance(told, dict) else None

    def _check(self) -> None:
        """Raises UserError unless this run may write here."""
        existing = self.path
        try:
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
        except OSError as error:  # a name of more than 255 characters, a loop of links
            raise UserError(f"run_dir={str(self.path)[:40]}... ({error.strerror}); choose another run_dir") from error
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(
                f"run_dir={self.path}: {existing} is no directory that you may write to; choose another run_dir"
            )
        if self.stored is None:
            if self.path.exists() and any(not _ours(path) for path in self.path.iterdir()):
                raise UserError(f"run_dir={self.path} holds files that are no run of esd; choose another run_dir")
            return
        foreign = [name for name, value in self.stored.items() if value is not None and name not in self.settings]
        if foreign:
            raise UserError(
                f"run_dir={self.path} holds a run of another program or version of esd, which sets {foreign[0]}; "
                "choose another run_dir"
            )
        stored = _filled(self.stored, self.defaults)
        for name in self.settings:
            told = _difference(name, stored.get(name), self.settings.get(name), self.neutral)
            if name not in self.neutral and told:
                raise UserError(
                    f"run_dir={self.path} holds another run ({told}); choose another run_dir, or remove that directory"
                )


def _without(settings: Mapping[str, Any], names: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The settings but those of these dotted names."""
    return {
        name: _without(value, names, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if f"{prefix}{name}" not in names
    }


def _filled(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as stored, and the defaults of those that the version of esd which stored them did not have."""
    return {
        **stored,
        **{
            name: _filled(stored[name], value) if isinstance(stored.get(name), Mapping) else stored.get(name, value)
            for name, value in defaults.items()
            if name not in stored or isinstance(value, Mapping)
        },
    }


def _ours(path: Path) -> bool:
    """Whether a file is one that a run leaves before its config.yaml is there."""
    return path.name == LOCK or path.name.startswith(".tmp-")


def _typed() -> list[str]:
    """The settings as typed, without what the edge adds for a sweep."""
    return [argument for argument in sys.argv[1:] if not argument.startswith("hydra.sweep.dir=")]


def _difference(name: str, here: Any, now: Any, neutral: Collection[str] = NEUTRAL) -> str:
    """`objective.eta=2.0 there, 1.0 here` for the first setting that differs and is not neutral; empty where none does.

    A setting that is null is as good as one that an older run did not know.
    """
    if isinstance(here, dict) and isinstance(now, dict):
        keys = [key for key in now | here if f"{name}.{key}" not in neutral]
        told = (_difference(f"{name}.{key}", here.get(key), now.get(key), neutral) for key in keys)
        return next(filter(None, told), "")
    return "" if here == now else f"{name}={here} there, {now} here"


def tracker_arguments(tracker: TrackerConfig, run: Path) -> dict[str, Any]:
    """Arguments for `Accelerator(...)` that turn a tracker on, from a private environment for wandb.

    wandb is told to record neither the command line, nor git, nor code: a token in one of them would leave
    the machine.

    Raises:
        UserError: the tracker's package is not installed.
    """
    if tracker.name == "none":
        return {}
    if importlib.util.find_spec(tracker.name) is None:
        raise UserError(f"tracker.name={tracker.name} is not installed; pip install {tracker.name}, or tracker=none")
    for variable in ("WANDB_X_DISABLE_META", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
        os.environ.setdefault(variable, "true")
    return {"log_with": tracker.name, "project_dir": str(run / tracker.name)}


def start_tracker(accelerator: Any, tracker: TrackerConfig, run: RunDirectory) -> None:
    """Opens the tracker on the main process, with the settings as flat hyperparameters."""
    if tracker.name == "none":
        return
    # The id outlives a restart: what an offline run and its resumption recorded is synced as one run.
    identity = slug(str(run.path.resolve()))[-8:]
    wandb = {
        "mode": tracker.mode,
        "dir": str(run.path),
        "name": run.path.name,
        "id": identity,
        "resume": "allow",
    }
    accelerator.init_trackers(
        tracker.project,
        config=flat(run.settings),
        init_kwargs={"wandb": wandb} if tracker.name == "wandb" else {},
    )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """`{"objective.eta": 1.0, ...}`: TensorBoard takes no nested values and no lists."""
    leaves: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return leaves
