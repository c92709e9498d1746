"""The wheel: what `pip install` gives someone without a clone, settings included."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from esd.config.paths import conf_dir
from tests.programs import FAST

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow(reason="builds and installs a wheel, and starts three Pythons, two of which import torch")


def output(*command: object, folder: Path, code: int = 0) -> str:
    """What a command that ends with `code` prints or complains about, run in `folder` with no sight of the clone."""
    hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=hidden)
    assert ended.returncode == code, ended.stderr
    return ended.stderr if code else ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this clone, built with what is installed here."""
    wheel_module = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("dist")
    return Path(next(wheel_module.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has the wheel, and sees the dependencies installed here."""
    folder = tmp_path_factory.mktemp("environment")
    output(sys.executable, "-m", "venv", "--without-pip", "there", folder=folder)
    python = folder / "there/bin/python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    output(sys.executable, "-m", "pip", "--python", python, *install, wheel, folder=folder)
    (library,) = (folder / "there/lib").glob("python*/site-packages")
    # a .pth file adds folders after the wheel's; those of the folders themselves, such as a clone's, are not read
    (library / "dependencies.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return python


def test_the_wheel_holds_all_of_the_package_and_every_file_of_settings(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    files = [path.relative_to(ROOT) for path in (ROOT / "esd").rglob("*") if path.is_file()]
    package = {str(path) for path in files if "__pycache__" not in path.parts}
    settings = {f"esd/conf/{path.relative_to(conf_dir())}" for path in conf_dir().rglob("*.yaml")}
    assert names == package | settings


def test_the_installed_program_runs_far_from_the_clone(python: Path, saved_models: Path, tmp_path: Path) -> None:
    assert "erase_thing" in output(python, "-m", "esd.train", "--help", folder=tmp_path)
    (tmp_path / "base").symlink_to(saved_models / "base")
    settings = ("concepts=[cat]", *FAST, "experiment=erase_thing", "prompts=['{}']", "preserve.prompts=[]")
    told = output(python.parent / "esd", "train", *settings, "plan_only=true", folder=tmp_path)
    assert "esd_u: " in told and "nothing was trained" in told
    assert Path(output(python, "-c", "import esd; print(esd.__file__)", folder=tmp_path)).is_relative_to(
        python.parents[1]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    told = output(python, "-m", "esd.train", "concepts=[cat]", folder=tmp_path, code=2)
    assert "comes with a clone of esd" in told and len(told.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
