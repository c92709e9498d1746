"""Prompt sets by name: each known by its hash, said where it is from, and read from the user's copy."""

import hashlib
from pathlib import Path

import pytest

from esd.errors import UserError
from esd.evaluation import promptsets
from esd.evaluation.judges_by_name import ASKED
from esd.evaluation.promptsets import Copy, find, known


def a_copy(monkeypatch: pytest.MonkeyPatch, name: str, path: Path, label: str = "") -> None:
    """Has the set of a name be the file at a path."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    copy = Copy(name, "owner/name", "0" * 40, "p.csv", digest, "MIT", label)
    monkeypatch.setattr(promptsets, "known", lambda: {name: (copy,)})


def test_every_set_says_which_file_it_is() -> None:
    assert {"esd_vangogh", "mu_church", "lu_tench", "sixcd_object", "i2p", "ring_a_bell", "p4d"} <= set(known())
    every = [copy for copies in known().values() for copy in copies]
    assert len({copy.sha256 for copy in every}) == len(every)
    for copy in every:
        assert len(copy.sha256) == 64 and len(copy.commit) == 40 and copy.repository.count("/") == 1
        assert copy.file.endswith(".csv") and copy.licence in ("MIT", "")
        assert not copy.label or copy.label.partition("=")[0] in ASKED


@pytest.mark.parametrize("name", known())
def test_a_set_is_asked_for_and_checked(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"get .*{known()[name][0].repository}.*prompts={name}:PATH"):
        find(name)
    with pytest.raises(UserError, match="cannot be read"):
        find(f"{name}:{tmp_path / 'none.csv'}")
    (tmp_path / "p.csv").write_text("prompt\na cat\n")
    with pytest.raises(UserError, match=r"has sha256 .* is one of"):
        find(f"{name}:{tmp_path / 'p.csv'}")


def test_the_right_copy_is_read_under_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.csv"
    path.write_text(",case_number,prompt,evaluation_seed,artist\n0,7,a field by night,12,Vincent\n")
    a_copy(monkeypatch, "esd_vangogh", path)
    (row,), (told,) = find(f"esd_vangogh:{path}")
    assert (row.case_number, row.evaluation_seed, row.labels) == (7, 12, {"artist": "Vincent"})
    assert told == "esd_vangogh: 1 prompts, p.csv of github.com/owner/name at 0000000"


def test_what_a_whole_set_shows_is_a_label_that_judges_are_held_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,seed,label_str\na tench,12, Tinca tinca\n")
    a_copy(monkeypatch, "esd_imagenet", path)
    assert find(f"esd_imagenet:{path}")[0][0].labels == {"class": "Tinca tinca"}
    a_copy(monkeypatch, "lu_van_gogh", path, "artist=Van Gogh")
    assert find(f"lu_van_gogh:{path}")[0][0].labels == {"class": "Tinca tinca", "artist": "Van Gogh"}


def test_the_empty_row_of_i2p_is_left_out_and_guidance_and_size_are_those_of_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ",prompt,hard,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,case_number"
    for empty in ("", "nan"):  # in the original, and by way of pandas
        lines = [columns, "0,a cat,1,5,7.5,512,256,0", f"1,{empty},0,6,7,512,512,2260", "2,a cat,0,5,7.5,512,256,2261"]
        path = tmp_path / "p.csv"
        path.write_text("\n".join(lines) + "\n")
        a_copy(monkeypatch, "i2p", path)
        (row,), (told,) = find(f"i2p:{path}")
        assert (row.prompt, row.guidance, row.width, row.height) == ("a cat", 7.5, 512, 256)
        assert row.labels == {"hard": "1"} and "; left out: 2 rows, empty or the same" in told


def test_a_name_that_no_set_has_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"NAME:PATH with one of esd_art, .*i2p"):
        find("esd_van_gogh")
