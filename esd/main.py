"""The edge every program shares: instant help, composition by Hydra, one line for a mistake, exit codes.

Exit codes: 0 done, 1 a fault of ours (with its traceback), 2 the user's mistake (one line: the value, what
is allowed, how to mend it), 130 stopped by Ctrl-C and 143 by SIGTERM, both resumable with the same command. A
sweep goes on after a job that failed, and ends with the first such code; a stopped one ends it.

Hydra composes the configuration and runs sweeps; it owns no files. Its `multirun.yaml` goes to a scratch
folder, and each job of a sweep gets a directory of its own below `run_dir`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esd.config.options import fields_of
from esd.config.paths import conf_dir
from esd.errors import UserError

# Hydra's own flags that are let through; --experimental-rerun, which unpickles a file, is not.
FLAGS = (
    "--multirun",
    "--cfg",
    "--resolve",
    "--package",
    "--info",
    "--run",
    "--version",
    "--hydra-help",
    "--config-dir",
    "--config-name",
    "--config-path",
    "--shell-completion",
    *("-m", "-c", "-p", "-i", "-r", "-sc", "-cp", "-cn", "-cd"),
)
# Of Hydra's own settings those that choose how a sweep runs and where settings are found; others move folders about.
OPEN = ("hydra/launcher", "hydra.launcher.", "hydra/sweeper", "hydra.sweeper.", "hydra.sweep.", "hydra.searchpath")
PLAIN = ("concepts", "erase_from", "prompts", "preserve.prompts")  # texts in which ${...} would be filled in
HELP_END = """\
Flags: --multirun runs every combination of a=1,2 b=x,y, each in its own directory.
--config-dir FOLDER adds your own: FOLDER/experiment/mine.yaml, which begins as those of conf/experiment do, is
experiment=mine. --cfg job prints the settings as composed. The same command resumes a stopped run.
Exit codes: 0 done, 2 a mistake in the input, 130 (Ctrl-C) and 143 (SIGTERM) stopped and resumable, 1 a fault of
esd. A sweep goes on after a job that failed and ends with its code."""
LAUNCHED = ("train", "generate", "evaluate")  # programs that share their work out among processes
EXIT_USER = 2
EXIT_SIGNAL = 128  # plus the signal's number, as shells have it


def run_program(name: str, schema: type, task: Callable[[Any], int]) -> None:
    """Runs `task(config)` for the command line in `sys.argv`; leaves with its exit code unless that is 0.

    Args:
        name: of the program and of its YAML file in conf/.
        schema: the dataclass of its configuration, with `check()` and `run_path()`.
        task: gets a checked instance of `schema`; returns an exit code; may raise UserError.
    """
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(help_text(name, schema))
            return
        for argument in sys.argv[1:]:
            if argument.startswith("-") and argument.split("=")[0] not in FLAGS:
                raise UserError(
                    f"unknown flag {argument}; settings are given without dashes, as concepts=[cat]; --help lists all"
                )
        sys.argv[1:] = settled(name, sys.argv[1:])
        with tempfile.TemporaryDirectory(prefix="esd-sweep-") as scratch:
            _run_hydra(name, schema, task, scratch)
    except UserError as error:
        sys.exit(tell(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(EXIT_SIGNAL + signal.SIGINT)


def settled(name: str, arguments: list[str]) -> list[str]:
    """The arguments without `experiment=null`, and with `tracker=null` as `tracker=none`: Hydra knows no null group.

    Raises:
        UserError: another group is given what names no file, or a setting of Hydra's own is not open.
    """
    kept, groups = [], groups_of(name)
    for argument in arguments:
        setting, _, value = argument.partition("=")
        plain = setting.lstrip("+~")
        if plain.startswith(("hydra.", "hydra/")) and not plain.startswith(OPEN):
            raise UserError(f"{argument}: Hydra's own settings are esd's to make; allowed: {', '.join(OPEN)}")
        if argument == "experiment=null":
            continue
        if argument == "tracker=null":
            argument = "tracker=none"
        elif setting in groups and any(_names_nothing(choice) for choice in value.split(",")):
            raise UserError(f"{argument}: allowed: {', '.join(groups[setting])}")
        kept.append(argument)
    return kept


def _names_nothing(choice: str) -> bool:
    """Whether Hydra would read a choice as null, a truth value or a number, not as a name."""
    try:
        float(choice)
    except ValueError:
        return choice.lower() in ("", "null", "true", "false")
    return True


def _run_hydra(name: str, schema: type, task: Callable[[Any], int], scratch: str) -> None:
    """Composes the configuration as Hydra's own command line does and runs one job or a sweep of them."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    codes: list[int] = []  # of a sweep's jobs, or of the only one

    def job(composed: DictConfig) -> None:
        try:
            refuse_unknown(unresolved(composed), schema())
            refuse_beaten_groups(composed, schema())
            config: Any = OmegaConf.to_object(composed)
            config.check()
            refuse_unread(config)
            config.run_dir = str(_job_path(config.run_path()))
            code = task(config)
        except UserError as error:
            code = tell(error)
        codes.append(code)
        if code > EXIT_SIGNAL:
            raise SystemExit(code)  # an Exception would make Hydra print lines of its own

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us instead of printing them
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # what they say of missing extras is no news to a user
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if {"--multirun", "-m"} & set(sys.argv):
        settings = [argument for argument in sys.argv[1:] if argument not in ("--multirun", "-m")]
        if not any(argument.startswith("hydra.sweep.dir=") for argument in settings):
            settings.append(f"hydra.sweep.dir='{scratch}'")
        sys.argv[1:] = ["--multirun", *settings]  # in front, for argparse reads no flag between settings
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, schema)) from error
    if code := next(filter(None, codes), 0):
        raise SystemExit(code)


def refuse_beaten_groups(composed: Any, schema: Any) -> None:
    """Raises UserError where an experiment sets a field otherwise than a group typed beside it.

    An experiment is composed last, so the group would be ignored there without a word. A field that was typed
    itself wins over both and is let through. What counts is what was composed, so it does not matter whether the
    experiment lies in conf/ or in a folder of the user's own, nor what it inherits.

    Args:
        composed: the settings of one job, for example of `experiment=erase_thing objective=concept_anchor`.
        schema: an instance of the program's configuration.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    given = {name.lstrip("+"): value for name, _, value in (typed.partition("=") for typed in hydra.overrides.task)}
    if "experiment" not in given:
        return
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    for group, choice in given.items():
        section = getattr(schema, group, None)
        file = next((path for folder in folders if (path := folder / group / f"{choice}.yaml").is_file()), None)
        if file is None or not dataclasses.is_dataclass(section):
            continue
        there = unresolved(composed[group])
        fields = {name: value for name, value in unresolved(OmegaConf.load(file)).items() if name in there}
        wanted = unresolved(OmegaConf.merge(OmegaConf.structured(section), fields))  # typed as the composed ones are
        beaten = [name for name in fields if wanted[name] != there[name] and f"{group}.{name}" not in given]
        if beaten:
            lost = ", ".join(f"{group}.{name}={there[name]}" for name in beaten)
            mend = " ".join(f"{group}.{name}={wanted[name]}" for name in beaten)
            raise UserError(
                f"{group}={choice} would be ignored: experiment={given['experiment']} sets {lost}; give the fields "
                f"themselves: {mend}"
            )


def refuse_unread(config: Any) -> None:
    """Raises UserError for a setting that was typed and that this run does not read, as its `unused()` tells."""
    from hydra.core.hydra_config import HydraConfig

    for typed in HydraConfig.get().overrides.task:
        name = typed.partition("=")[0].lstrip("+~")
        for unused in getattr(config, "unused", set)():
            if name == unused or name.startswith(f"{unused}."):
                raise UserError(f"{typed}: this run does not read it; leave it out, or ask for what does")


def unresolved(settings: Any) -> dict[str, Any]:
    """A DictConfig as a dictionary, ${...} left as it stands."""
    from omegaconf import OmegaConf

    made: Any = OmegaConf.to_container(settings, resolve=False)
    return made


def refuse_unknown(composed: Any, schema: Any, prefix: str = "") -> None:
    """Raises UserError for a key that the schema lacks, as `+objective.foo=1` adds one, and for ${...} in a text."""
    names = {spec.name for spec in dataclasses.fields(schema)}
    for name, value in composed.items():
        if name not in names:
            raise UserError(f"unknown setting '{prefix}{name}'; {_nearest(name, schema, prefix)}; --help lists all")
        known = getattr(schema, name)
        if dataclasses.is_dataclass(known) and isinstance(value, dict):
            refuse_unknown(value, known, f"{prefix}{name}.")
        elif prefix + name in PLAIN and "${" in str(value):
            raise UserError(
                f"{prefix}{name}={value} holds '${{', which would be filled in from elsewhere; allowed: text without it"
            )


def _nearest(name: str, schema: Any, prefix: str = "") -> str:
    """`nearest: objective.eta` for a setting that is unknown."""
    near = difflib.get_close_matches(prefix + name, [prefix + field for field, _, _ in fields_of(schema)], n=3)
    return f"nearest: {', '.join(near) or 'none'}"


def _job_path(run_path: Path) -> Path:
    """The run directory of this job: `run_path`; in a sweep, one below it named by number and settings."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return run_path
    parser = OverridesParser.create()
    typed = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    fixed = {told.key_or_group for told in parser.parse_overrides(typed) if not told.is_sweep_override()}
    jobs = zip(hydra.overrides.task, parser.parse_overrides(hydra.overrides.task), strict=True)
    swept = [override for override, told in jobs if told.key_or_group not in fixed]
    return run_path / re.sub(r"[^\w.-]+", "_", "_".join([str(hydra.job.num), *swept]))[:120]


def tell(error: UserError) -> int:
    """Prints the one line of a user's mistake, once over all processes; returns the exit code for it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # a launcher ends all processes when one leaves; the one that speaks goes first
    else:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return EXIT_USER


def _explain(error: Exception, schema: type) -> str:
    """One line for an error of Hydra or OmegaConf: what was typed, what is allowed, how to mend it."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException) and "=~" in str(error.override):
        return f"{error.override!r}: write $HOME for ~, or quote it twice: 'run_dir=\"~/results\"'"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read as SETTING=VALUE; quote text that holds quotes, commas, "
            """brackets or =: 'concepts=["AC/DC, live"]'"""
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: allowed: {', '.join(error.options or ())}"
    told = f"{error}\n{error.__cause__ or ''}"
    if unknown := re.search(r"Could not override '(.+?)'", told):
        return f"unknown setting '{unknown[1]}'; {_nearest(unknown[1], schema())}; --help lists all"
    if headless := re.search(r"In '(\w+)/(.+?)': .*Key '\1' not in", told, flags=re.DOTALL):
        return f"{headless[1]}={headless[2]}: its file sets nothing; begin it with the line '# @package _global_'"
    internal = ("full_key:", "reference_type=", "object_type=")
    lines = [line.strip() for line in told.splitlines() if line.strip() and not line.strip().startswith(internal)]
    mend = "--help tells what each setting may be"
    if "ListConfig" in told:
        mend = "give a list, such as concepts=[cat]"
    return "; ".join([*dict.fromkeys(lines), mend])


def help_text(name: str, schema: type) -> str:
    """The text of --help: an example, every setting with its default and meaning, groups, flags, codes."""
    yaml = (conf_dir() / f"{name}.yaml").read_text()
    example = yaml.splitlines()[0].lstrip("# ")
    launch = f", or accelerate launch -m esd.{name} ..." if name in LAUNCHED else ""
    lines = [
        f"usage: python -m esd.{name} SETTING=VALUE ...   (or: esd {name} ...{launch})",
        "",
        f"  {example}",
        "",
        "Settings (= default):",
    ]
    for field, value, spec in fields_of(schema()):
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        one_of = f" [{', '.join(spec.metadata['one_of'])}]" if spec.metadata["one_of"] else ""
        lines.append(f"  {f'{field}={shown}':<36} {spec.metadata['help']}{one_of}")
    lines += ["", "Groups of settings, in conf/ (an experiment sets several at once):"]
    lines += [f"  {group}={' | '.join(choices)}" for group, choices in groups_of(name).items()]
    return "\n".join([*lines, "", HELP_END])


def groups_of(name: str) -> dict[str, list[str]]:
    """The groups that a program's YAML file lists, each with its choices in conf/."""
    groups = re.findall(r"^  - (\w+):", (conf_dir() / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    return {group: sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")) for group in groups}
