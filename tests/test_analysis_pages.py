"""The pages of the analyses: one for each, whose lines of Python run and whose figures there are."""

import re
from pathlib import Path

import pytest

import esd.analysis
from esd.config.analyze import ANALYSES
from tests import tiny
from tests.programs import erased_weights

PAGES = Path(__file__).parents[1] / "docs/analysis"
LOADED = re.compile(r"\w+\.from_pretrained\([^)]*\)")


def code(page: str) -> str:
    """The lines of Python on a page, on a model of which `pipe` is the pipeline, in a step."""
    written = page.split("```python\n")[1].split("```")[0]
    return re.sub(r"num_steps=\d+", "num_steps=2", LOADED.sub("pipe", written)).replace("range(100)", "range(3)")


def test_every_analysis_has_a_page_with_its_command_and_figures_that_are_there() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(ANALYSES)
    for name in ANALYSES:
        page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
        assert f"python -m esd.analyze analysis={name} " in page and figures
        assert all((PAGES / figure).is_file() for figure in figures)


@pytest.mark.parametrize("name", ANALYSES)
def test_the_lines_of_python_on_the_page_make_a_figure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    erased_weights(tmp_path / "runs/cat/erased.safetensors")
    written = code((PAGES / f"{name}.md").read_text(encoding="utf-8"))
    assert len([line for line in written.splitlines() if line and "import" not in line]) <= 10
    exec(compile(written, f"{name}.md", "exec"), {"pipe": tiny.pipeline()})
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_the_example_of_the_package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert esd.analysis.__doc__ is not None
    written = [line[4:] for line in esd.analysis.__doc__.splitlines() if line.startswith("    ")]
    exec(
        compile(re.sub(r"num_steps=\d+", "num_steps=1", "\n".join(written)), "esd.analysis", "exec"),
        {"pipe": tiny.pipeline()},
    )
    assert (tmp_path / "out/captions.md").is_file()
