"""House rules that no tool holds: no machine's paths, no index addresses, pins, live links, reasons."""

import ast
import doctest
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".cfg", ".sh", ".txt", ".cff", ".json", ""}

MACHINE_PATH = re.compile(r"(^|[\s\"'`=(:,\[])/(work|tmp|farm|root|home|opt|Users|mnt)/[\w.]")
# the [-] and [.] keep this file from matching itself
INDEX = re.compile(r"index[-]url|find[-]links|(pypi|pythonhosted|npmjs|download[.]pytorch)[.]org")


def ours() -> list[Path]:
    """The files that are, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """`file:line text` of every line in our text files that matches."""
    found = []
    for path in ours():
        if path.suffix not in TEXT or path.stat().st_size > 1_000_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [
            f"{path.relative_to(ROOT)}:{number} {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    return found


def test_no_file_names_a_path_of_one_machine() -> None:
    assert not (found := lines_matching(MACHINE_PATH)), "\n".join(found)


def test_no_file_names_a_package_index() -> None:
    assert not (found := lines_matching(INDEX)), "\n".join(found)


def pins() -> dict[str, str]:
    """Package -> pinned version of constraints.txt, names normalised."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    rows = [line.split("#")[0].strip() for line in text.splitlines()]
    assert all("==" in row for row in rows if row), "constraints.txt holds exact pins only"
    return {normal(row.split("==")[0]): row.split("==")[1] for row in rows if row}


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_constraints_pin_torch_without_a_build_suffix() -> None:
    assert re.fullmatch(r"[\d.]+", pins()["torch"])


def test_everything_that_is_asked_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {normal(re.split(r"[<>=!~\[; ]", row)[0]) for row in asked}
    assert names <= set(pins()), f"not in constraints.txt: {sorted(names - set(pins()))}"


def test_the_source_distribution_holds_what_the_repository_does() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    there = {path.relative_to(ROOT).parts[0] for path in ours()}
    always = {"pyproject.toml", ".gitignore", ".gitattributes"}
    assert not (left := there - always - {*built["sdist"]["only-include"]}), f"not in the sdist: {sorted(left)}"


def test_everything_the_package_imports_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {normal(re.split(r"[<>=!~\[; ]", row)[0]) for row in project["dependencies"]}
    extras = {name: rows for name, rows in project["optional-dependencies"].items() if name not in ("dev", "emoji")}
    asked |= {normal(re.split(r"[<>=!~\[; ]", row)[0]) for rows in extras.values() for row in rows}
    asked |= {"esd", *sys.stdlib_module_names}
    named_otherwise = {"PIL": "pillow", "yaml": "pyyaml", "hydra": "hydra-core"}
    missing = set()
    for path in sorted((ROOT / "esd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names}:
                if named_otherwise.get(top, top) not in asked:
                    missing.add(f"{path.relative_to(ROOT)} imports {top}")
    assert not missing, f"not in pyproject.toml: {sorted(missing)}"


def pages() -> list[Path]:
    """The pages a reader opens."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_on_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    local = [target for target in targets if not re.match(r"[a-z]+:|#", target)]
    dead = [target for target in local if not (page.parent / target.partition("#")[0]).exists()]
    assert not dead, f"{page.relative_to(ROOT)} links to what is not there: {dead}"


def test_every_slow_test_says_why() -> None:
    silent = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        marks = [n for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n) == "pytest.mark.slow"]
        reasoned = [n.func for n in nodes if isinstance(n, ast.Call) and (n.args or n.keywords)]
        silent += [f"{path.relative_to(ROOT)}:{mark.lineno}" for mark in marks if mark not in reasoned]
    assert not silent, f"pytest.mark.slow without a reason: {silent}"


EXAMPLES = [path for path in sorted((ROOT / "esd").rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_in_docstrings_hold(path: Path) -> None:
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed
