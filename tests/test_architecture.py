"""The floors of docs/architecture.md, held: imports go down only and never in circles, the edges start fast.

All is read with `ast`; nothing of esd is imported. A new module gets its floor here and in the picture.
"""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "esd"

# A package stands for everything in it.
FLOORS: dict[int, tuple[str, ...]] = {
    0: ("errors", "objectives", "seeding", "selection"),
    1: ("families", "weights", "lora", "float8"),
    2: ("trajectory", "sources", "checkpoint", "storage", "progress", "interventions"),
    3: ("plan", "trainer", "learner", "resuming", "description", "memory", "activations", "evaluation", "analysis"),
    4: (
        *("config", "run", "model", "main", "launch", "drawing", "judging"),
        *("train", "generate", "evaluate", "analyze", "canvas", "attacks", "report", "compare", "files", "cli"),
    ),
}
PROGRAMS = ("train", "generate", "evaluate", "analyze", "report", "compare", "files", "cli")
EDGE = max(FLOORS)
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

NEVER_BELOW_THE_EDGE = {"hydra", "omegaconf", "wandb", "tensorboard"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "wandb"}


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, where it stands, and whether importing the file runs it."""

    name: str
    line: int
    at_start: bool


def modules() -> dict[str, Path]:
    """Dotted name -> file, for all of esd."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def statements(node: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement under `node`, and whether importing the file executes it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_start
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(child, at_start=False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for branch, runs in ((child.body, False), (child.orelse, at_start)):
                yield from statements(ast.Module(body=branch, type_ignores=[]), runs)
        else:
            yield from statements(child, at_start)


def imports(module: str) -> list[Import]:
    """What `module` imports; `from esd import selection` counts as esd.selection."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node, at_start in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, at_start) for alias in node.names]
            continue
        source = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*above, source] if source else above)
        for alias in node.names:
            inner = f"{source}.{alias.name}"
            if source == "esd" and alias.name.startswith("__"):
                continue  # `from esd import __version__` asks nothing of the front door
            found.append(Import(inner if inner in MODULES else source, node.lineno, at_start))
    return found


def floor(module: str) -> int:
    """The floor a module of esd stands on; esd/__init__.py is the front door, at the edge."""
    parts = module.split(".")
    return EDGE if len(parts) == 1 else FLOOR_OF.get(parts[1], EDGE)


def reached_at_start(module: str) -> dict[str, str]:
    """Everything that importing `module` imports, with the chain that leads there."""
    chains = {module: module}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        for found in imports(current) if current in MODULES else []:
            parts = found.name.split(".")
            # importing a.b.c runs a and a.b first
            for name in [".".join(parts[:n]) for n in range(1, len(parts) + 1)] if found.at_start else []:
                if name not in chains:
                    chains[name] = f"{chains[current]} -> {name}"
                    waiting.append(name)
    return chains


def where(module: str, found: Import) -> str:
    """`file:line imports name`, as messages show it."""
    return f"{MODULES[module].relative_to(ROOT)}:{found.line} imports {found.name}"


def test_every_module_has_a_floor() -> None:
    homeless = {m.split(".")[1] for m in MODULES if "." in m} - set(FLOOR_OF)
    assert not homeless, f"give {sorted(homeless)} a floor in FLOORS here and in docs/architecture.md"


def test_imports_go_down_only() -> None:
    up = [
        f"{where(module, found)}: floor {floor(module)} to floor {floor(found.name)}"
        for module in MODULES
        for found in imports(module)
        if module != "esd" and found.name.split(".")[0] == "esd" and floor(found.name) > floor(module)
    ]
    assert not up, "\n".join(up)


def test_nothing_imports_in_circles() -> None:
    inside = [module for module in MODULES if module != "esd"]  # the front door imports by need only
    graph = {m: {found.name for found in imports(m) if found.name in MODULES} for m in inside}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports run in a circle: " + " <- ".join(error.args[1]))


def test_floors_below_the_edge_know_no_configuration_and_no_tracker() -> None:
    known = [
        where(module, found)
        for module in MODULES
        for found in imports(module)
        if floor(module) < EDGE and found.name.split(".")[0] in NEVER_BELOW_THE_EDGE
    ]
    assert not known, "\n".join(known)


def test_the_maths_needs_torch_and_nothing_else() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "esd"}
    others = [
        where(module, found)
        for module in MODULES
        for found in imports(module)
        if floor(module) == 0 and found.name.split(".")[0] not in allowed
    ]
    assert not others, "\n".join(others)


@pytest.mark.parametrize("program", ["esd", *(f"esd.{name}" for name in PROGRAMS)])
def test_a_program_loads_nothing_heavy_before_it_knows_what_to_do(program: str) -> None:
    assert program in MODULES, f"{program} is not written; take it out of PROGRAMS"
    heavy = [chain for name, chain in reached_at_start(program).items() if name.split(".")[0] in HEAVY]
    assert not heavy, "import where it is used, so that --help is fast:\n" + "\n".join(heavy)


def test_no_program_imports_another() -> None:
    names = {f"esd.{name}" for name in PROGRAMS}
    siblings = [where(name, found) for name in sorted(names) for found in imports(name) if found.name in names]
    assert not siblings, "what two programs share has a module of its own:\n" + "\n".join(siblings)


def test_every_module_says_what_it_is() -> None:
    silent = [m for m, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text("utf-8")))]
    assert not silent, f"no module docstring: {silent}"


def test_the_picture_shows_every_module_on_its_floor() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown: dict[str, int] = {}
    current = None
    for row in text.split("```")[1].splitlines():
        if begins := re.match(r"floor (\d)", row):
            current = int(begins[1])
        if current is not None:
            shown |= dict.fromkeys(re.findall(r"esd/(\w+)(?:\.py|/)", row), current)
    missing = {m.split(".")[1] for m in MODULES if "." in m} - set(shown)
    assert not missing, f"docs/architecture.md does not show {sorted(missing)}"
    assert shown == {name: FLOOR_OF.get(name) for name in shown}
