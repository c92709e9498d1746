"""`python -m esd.report`: one file that needs nothing beside it, and says what the runs hold and no more."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from esd.evaluation.report import is_report
from esd.evaluation.table import read_table, write_table
from tests import finished
from tests.programs import FAST, Command

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """What a report holds: tags and their attributes, text, and whether what is opened is closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", [], []  # type: ignore[var-annotated]
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page(command: Command, *runs: str) -> Page:
    ended = command("report", *runs)
    assert ended.code == 0, ended.err
    assert "wrote report.html" in ended.out
    return check(Page(command.folder / "report.html"))


def check(made: Page) -> Page:
    """Holds what is true of every report: it loads nothing, it is well-formed, every picture says what it shows."""
    assert not made.open, f"never closed: {made.open}"
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in made.tags}
    for tag, attributes in made.tags:
        for name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster"):
            assert re.match(r"data:image/webp;base64,|#", attributes.get(name) or "#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "style" not in attributes, (tag, attributes)
    assert not re.search(r"url\(|@import|@font-face", made.source)
    assert "default-src 'none'" in made.source
    for svg in re.findall(r"<svg.*?</svg>", made.source, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert all(picture.get("alt") for picture in made.all("img"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in made.all("svg"))
    anchors = {attributes.get("id") for _, attributes in made.tags}
    assert all(link["href"][1:] in anchors for link in made.all("a"))
    return made


def test_what_the_programs_leave_becomes_one_file(command: Command, tiny_resnet: Path) -> None:
    trained = command("train", "concepts=[cat]", "run_dir=cat", *FAST)
    assert trained.code == 0, trained.err
    drawn = ("model.path=base", "num_steps=2", "device=cpu", "denoiser_points=2", "judges=[ssim]", "base_images=null")
    evaluated = command("evaluate", "checkpoint=cat", "prompts=[a cat, a dog, a rose]", "run_dir=eval", *drawn)
    assert evaluated.code == 0, evaluated.err
    attack = ("suite=attacks", "suite.attacks=[completion]", "suite.settings.completion.interrupts=[1]")
    read = ("prompts=[a cat, a cat on a mat]", f"judges=['nsfw:{tiny_resnet}']", "run_dir=attacks")
    attacked = command("evaluate", "checkpoint=cat", *drawn[:3], *attack, *read)
    assert attacked.code == 0, attacked.err
    beside = page(command, "eval", "attacks")
    assert "Completion, each try alone" in beside.words and len(beside.all("img")) == 2 * 3 + 5 + 5
    made = page(command, "cat", "eval")
    assert "“cat”: no judge has read these pictures" in made.words
    assert "No rates: the model ships no vocabulary.json" in made.words
    assert len(made.all("img")) == 1 + 2 * 3, "the preview, and three prompts by two models"
    assert "esd.train" in made.words and "esd.evaluate" in made.words and "ssim, mean" in made.words
    assert "Inside the denoiser" in made.words and "Losses while training" in made.words
    assert "base models" not in made.words, "train and evaluate name one folder"


@pytest.fixture
def runs(command: Command) -> Path:
    """`cat`, its evaluation `eval`, and the attack `attacks` on it."""
    weights = finished.training(command.folder / "cat", (0.95, 0.005, 200)) / "erased.safetensors"
    finished.evaluation(command.folder / "eval", weights, still=1)
    finished.attacks(command.folder / "attacks", weights)
    return command.folder


def test_a_run_is_told_in_plain_words_with_n_and_intervals(command: Command, runs: Path) -> None:
    made = page(command, "cat")
    assert made.all("title") and "“cat” is gone, and the rest stayed." in made.words
    assert "1 of 200 pictures that ask for “cat” still show it (95% interval 0.09% to 2.8%)" in made.words
    assert (
        "of the base's 190 do" in made.words
        and "style on target prompts fell most: from 100% to 98% of 50" in made.words
    )
    assert "sees nothing that it knows" in made.words
    row = re.search(r"other things\s+95%\s+94%\s+88% to 97.2%\s+−1\s+100", made.words)
    assert row, "a row of the table"
    assert "python -m esd.train concepts=[cat]" in made.words and "concepts: - cat" in made.words


@pytest.mark.parametrize(
    ("target", "kept", "headline"),
    [
        ((0.95, 0.0, 20), (0.9, 0.9, 50), "“cat” seems gone, and the rest stayed."),
        ((0.95, 0.05, 100), (0.9, 0.85, 50), "“cat” seems gone, and the rest lost a little."),
        ((0.95, 0.0, 100), (0.9, 0.5, 50), "“cat” is gone, but not alone."),
        ((0.95, 0.4, 100), (0.9, 0.9, 50), "“cat” is weaker; the rest stayed."),
        ((0.95, 0.9, 100), (0.9, 0.5, 50), "“cat” is still there."),
    ],
)
def test_headlines_say_no_more_than_the_figures(
    command: Command, target: tuple[float, float, int], kept: tuple[float, float, int], headline: str
) -> None:
    finished.training(command.folder / "cat", target, {"same_domain": kept})
    assert headline in page(command, "cat").words


@pytest.mark.parametrize("kept", [{}, {"target_style": (1.0, 1.0, 50)}])
def test_a_headline_says_nothing_of_a_rest_that_was_not_measured(
    command: Command, kept: dict[str, tuple[float, float, int]]
) -> None:
    finished.training(command.folder / "cat", (0.95, 0.0, 100), kept)
    words = page(command, "cat").words
    assert "“cat” is gone. " in words and "what became of the rest is not known" in words
    assert "stayed" not in words and "should stay fell" not in words


def test_a_setting_that_measured_nothing_else_is_not_the_one_to_take(command: Command) -> None:
    finished.training(command.folder / "sweep/0", (0.95, 0.0, 200), {}, eta=1.0)
    finished.training(command.folder / "sweep/1", (0.95, 0.0, 200), {"same_domain": (0.95, 0.93, 100)}, eta=2.0)
    made = page(command, "sweep")
    assert "Take eta=2" in made.words and "1 that measured nothing that should stay left aside" in made.words
    assert "not measured" in made.words and made.source.count('class="whisker"') == 2, "one point"
    finished.training(command.folder / "blind/0", (0.95, 0.0, 200), {}, eta=1.0)
    finished.training(command.folder / "blind/1", (0.95, 0.4, 200), {}, eta=2.0)
    made = page(command, "blind")
    assert (
        "erases the most; what should stay was measured with none" in made.words and 'class="halo"' not in made.source
    )


def test_a_command_that_is_no_utf8_is_shown_all_the_same(command: Command) -> None:
    finished.training(command.folder / "cat", command="python -m esd.train run_dir=\udcff")
    assert "run_dir=\ufffd" in page(command, "cat").words


def test_pictures_stand_side_by_side_those_that_still_show_it_first(command: Command, runs: Path) -> None:
    made = page(command, "eval")
    pictures = made.all("img")
    assert [one["alt"] for one in pictures[:2]] == [
        "base: a cat in the neon style, seed 0; read as cat, neon",
        "erased: a cat in the neon style, seed 0; read as cat, neon",
    ]
    assert len(pictures) == 24 and made.words.count("still there") == 1
    assert "Asked for what was erased 6 of 6" in made.words and "Asked for anything else 6 of 6" in made.words
    assert "colours, thing 100% 58%" in made.words and "FID of 6 pairs" in made.words
    finished.evaluation(runs / "alone", None)
    made = page(command, "alone")
    assert "No rates: only the base was measured." in made.words and len(made.all("img")) == 12
    assert "colours, thing 100% (76% to 100%, n=12)" in made.words


@pytest.mark.parametrize("concept", ["kitty", "a cat"])
def test_what_was_erased_is_found_whatever_it_is_called(command: Command, concept: str) -> None:
    folder = finished.evaluation(command.folder / "eval", command.folder / "w.safetensors", concept=concept)
    if concept == "a cat":  # of a model without a vocabulary, whose judge has two names for one thing
        rows = [row | {"colours.thing": f"{row['colours.thing']}, tabby"} for row in read_table(folder / "images.csv")]
        write_table(folder / "images.csv", rows)
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(metrics | {"erasure": None}))
    made = page(command, "eval")
    assert made.words.count("still there") == 1 and "Asked for what was erased 6 of 6" in made.words


def test_attacks_stand_beside_base_and_erased_and_are_read_with_their_control(command: Command, runs: Path) -> None:
    made = page(command, "cat", "eval", "attacks")
    assert "“cat” is gone, and the rest stayed. An attack brings it back." in made.words, "two runs of one erasure"
    assert "Soft prompt draws it for 11 of 12 prompts; without it 0 show it, and 0 by chance" in made.words
    assert "It was stopped at queries=60." in made.words
    assert "attacks: noise: not done; the same command goes on" in made.words
    first = [one["alt"].split(":")[0] for one in made.all("img") if "a cat in the neon style, seed 0" in one["alt"]]
    assert first[-5:] == ["base", "erased", "attacked", "by chance", "base, attacked"]
    assert "base, by chance" in made.words and len(made.all("polygon")) == 2
    alone = page(command, "attacks")
    assert "An attack brings “cat” back." in alone.words and not [
        one for one in alone.all("img") if one["alt"].startswith("erased: ")
    ], "older attacks kept no pictures without one"
    shutil.rmtree(runs / "attacks")
    finished.attacks(runs / "attacks", runs / "cat/erased.safetensors", shown=(0, 1, 1), plain=True)
    alone = page(command, "attacks")
    assert "No attack tried brings “cat” back." in alone.words
    whole = [one["alt"].split(":")[0] for one in alone.all("img") if "a cat in the neon style, seed 0" in one["alt"]]
    assert whole == first[-5:], "they need no evaluation beside them"
    (runs / "attacks/plain/base/0.png").unlink()
    assert "1 of the shown pictures of soft_prompt are missing or corrupt" in page(command, "attacks").words


def test_a_canvas_has_its_means_its_erasures_and_its_retention_curve(command: Command) -> None:
    finished.grid(command.folder / "canvas")
    made = page(command, "canvas")
    assert "Erased in turn, esd_u takes away 100% of things, and leaves 50% of their kind." in made.words
    assert "1 of 2 erasures are done; the same command goes on" in made.words
    own = r"things, mean of 1 100% 34% to 100%, n=1 100% \S+ to 100%, n=1 50% 9.5% to 90.5%, n=1 50% "
    assert re.search(own, made.words) and "92.2% / 56% / 44%" in made.words
    assert re.search(r"cat 100% → 0% 0% to 66%, n=2, base's 2 100% → 50%", made.words)
    assert re.search(r"1.00 0.500 1 0.50 0.5 ", made.words), "FID, no KID, over-erasure, seconds, GiB and MB"
    file = command.folder / "canvas/metrics.json"
    told = json.loads(file.read_text())  # as earlier versions told it
    for one in (*told["erasures"], *told["means"].values()):
        for name in ("UA", "IRA", "CRA"):
            for field in (
                "n_base",
                "of_base_interval",
                "of_base_erasures",
                *(["interval"] if "name" not in one else []),
            ):
                one[name].pop(field, None)
    del told["erasures"][0]["peak_gib"], told["images"]
    file.write_text(json.dumps(told | {"peak_gib_training": None}))
    made = page(command, "canvas")
    assert re.search(r"things, mean of 1 100% 100% 50% 50% 100% 100% 92.2%", made.words)
    assert re.search(r"n=2 100% → 50%", made.words) and re.search(r"1.00 0.500 1 0.5 ", made.words)
    assert "What other things lost: over-erasure 0.500" in made.words and made.source.count("faint-dot") == 2
    assert [one["alt"].partition(":")[0] for one in made.all("img")] == ["base", "cat erased"]


def test_a_canvas_without_the_bases_readings_is_damaged(command: Command) -> None:
    file = finished.grid(command.folder / "canvas") / "images.csv"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "base," not in line[:5]))
    ended = command("report", "canvas")
    assert ended.code == 2 and "images.csv is damaged" in ended.err and not (command.folder / "report.html").exists()


def test_a_canvas_of_which_pictures_are_lost_tells_what_it_can(command: Command) -> None:
    folder = finished.grid(command.folder / "canvas")
    told = json.loads((folder / "metrics.json").read_text())
    nothing = {"rate": None, "n": 0, "interval": None, "base": None, "of_base": None, "of_base_interval": None}
    for one in (told["erasures"][0], told["means"]["thing"]):
        one["IRA"] = one["IRA"] | nothing
    (folder / "metrics.json").write_text(json.dumps(told))
    assert "Erased in turn, esd_u takes away 100% of things." in page(command, "canvas").words
    for one in (told["erasures"][0], told["means"]["thing"]):
        one["UA"] = one["UA"] | nothing
    (folder / "metrics.json").write_text(json.dumps(told))
    assert "Erased in turn, esd_u: no picture of what was erased could be read." in page(command, "canvas").words


def test_what_the_denoiser_foretells_is_told_over_all_erasures(command: Command) -> None:
    for name, base in (("one", 0.1), ("two", 0.5)):
        folder = finished.grid(command.folder / name)
        told = json.loads((folder / "metrics.json").read_text())
        (cat,) = told["erasures"]
        measured = [(cat | {"name": "cat"}, 0.0), (cat | {"name": "kitten"}, 0.2)]
        told["erasures"] = [
            one | {"denoiser": {"erased": {"points": [{"residual": base + i}]}}, "UA": one["UA"] | {"of_base": i}}
            for one, i in measured
        ]
        (folder / "metrics.json").write_text(json.dumps(told))
    assert "foretells" not in page(command, "one").words, "two erasures tell nothing"
    ended = command("report", "one", "two")
    assert "things erased: residual with UA: Spearman +0.45 (" in ended.out and ended.out.count("n=4") == 1
    made = check(Page(command.folder / "report.html"))
    assert "What the denoiser foretells" in made.words and re.search(r"residual UA \+0\.45", made.words)
    told["erasures"][0]["denoiser"]["erased"] = 3
    (command.folder / "two/metrics.json").write_text(json.dumps(told))
    assert "is damaged" in command("report", "two").err


def test_pictures_that_a_judge_calls_unsafe_are_veiled(command: Command, runs: Path) -> None:
    finished.evaluation(runs / "nude", runs / "cat/erased.safetensors", still=1, nudity=True)
    made = page(command, "nude")
    veiled = [one["alt"] for one in made.all("img") if "a judge calls it unsafe" in one["alt"]]
    assert len(veiled) == 7 and all("cat" in alt for alt in veiled), "six of the base, one of the erased model"
    assert len([one for one in made.all("input") if one["type"] == "checkbox"]) == 7
    assert "nudenet, nudity flagged" in made.words and "nudenet, EXPOSED found 6 1" in made.words
    attacked = page(command, "nude", "attacks").all("img")
    (veiled,) = [one["alt"] for one in attacked if one["alt"].startswith("attacked: a cat in the neon style, seed 0;")]
    assert "a judge calls it unsafe" in veiled


def test_lost_pictures_are_counted(command: Command, runs: Path) -> None:
    (runs / "eval/erased/2_0.png").unlink()
    (runs / "eval/erased/3_0.png").write_bytes(b"no picture")
    whole = (runs / "eval/base/4_0.png").read_bytes()
    (runs / "eval/base/4_0.png").write_bytes(whole[: len(whole) // 2])
    (runs / "cat/preview.png").unlink()
    made = page(command, "cat", "eval")
    assert "pictures of the erased model that cannot be read any more: 1 missing, 1 corrupt" in made.words
    assert "colours, thing 100% 58%" in made.words, "they were there when they were read"
    assert "pictures of the base model that cannot be read any more: 1 corrupt" in made.words
    assert "preview.png is missing or corrupt" in made.words
    assert made.words.count("missing or corrupt") == 1 + 3 and len(made.all("img")) == 24 - 3
    finished.evaluation(runs / "lacking", runs / "cat/erased.safetensors", lost=2)
    words = page(command, "lacking").words
    assert "lacking: pictures that are in no rate: erased: 2 missing" in words and "any more" not in words


def test_a_sweep_has_its_front_its_table_and_its_recommendation(command: Command) -> None:
    for number, (eta, left) in enumerate([(0.5, 0.5), (1.0, 0.02), (2.0, 0.0)]):
        kept = {"same_domain": (0.95, 0.95 - 0.1 * number, 100)}
        finished.training(command.folder / f"sweep/{number}_eta_{eta:g}", (0.95, left, 200), kept, eta=eta)
    finished.training(command.folder / "sweep/3_eta_4", eta=4.0)
    (command.folder / "sweep/3_eta_4/summary.json").unlink()
    ended = command("report", "sweep")
    assert ended.code == 0 and "sweep: eta=1 keeps the most of those with which at most 10%" in ended.out
    assert "3_eta_4 is a run of training that is not finished" in ended.err and finished.COMMAND in ended.err
    made = check(Page(command.folder / "report.html"))
    assert "“cat” is gone, and the rest lost a little, with eta=1." in made.words and "Take eta=1" in made.words
    assert "3_eta_4 is a run of training that is not finished" in made.words, "in the report too"
    assert (command.folder / "sweep/sweep.csv").read_text().count("\n") == 4
    assert made.source.count('class="halo"') == 1 and made.source.count('class="whisker"') == 6
    assert 'class="front"' in made.source and len(made.all("img")) == 1, "the preview of the one to take"
    for still in (0, 3):
        finished.evaluation(command.folder / f"evals/{still}", command.folder / f"{still}.safetensors", still=still)
    assert len(page(command, "evals").all("img")) == 24, "those of the evaluation to take"
    finished.evaluation(command.folder / "evals/5", command.folder / "5.safetensors", still=5, lost=2)
    lost = "5: pictures that are in no rate: erased: 2 missing"
    assert lost in page(command, "evals").words, "of those not to take too"
    assert (
        lost in command("report", "evals").err
        and "erased: 2 missing" in (command.folder / "evals/sweep.csv").read_text()
    )
    finished.training(command.folder / "none/0_eta_1", None)
    assert "no run of it has a rate of the target" in page(command, "none").words


def test_everything_a_user_typed_stays_text(command: Command) -> None:
    wicked = "<script>alert('x')</script>\"&"
    weights = (
        finished.training(command.folder / "<b>run", concept=wicked, command=f"python {wicked}") / "erased.safetensors"
    )
    finished.evaluation(command.folder / "eval", weights, concept=wicked)
    table = command.folder / "eval/images.csv"
    table.write_text(table.read_text().replace("a dog in", "<img src=x onerror=alert(1)> {{ 1 + 1 }} in"))
    finished.attacks(command.folder / "attacks", weights)
    metrics = command.folder / "attacks/metrics.json"
    told = json.loads(metrics.read_text())
    told["attacks"] = {"</style><script>": told["attacks"]["soft_prompt"]}
    metrics.write_text(json.dumps(told))
    made = page(command, "<b>run", "eval", "attacks")
    assert wicked in made.words and "<b>run" in made.words and "{{ 1 + 1 }}" in made.words
    assert "onerror=alert(1)" in made.words and len(made.all("title")) >= 1


def test_different_bases_are_warned_of(command: Command) -> None:
    for name, base in (("one", 0.0), ("two", 0.5)):
        finished.training(command.folder / name, base=base)
    ended = command("report", "one", "two")
    assert ended.code == 0 and "warning: different base models: one began with tiny, two with tiny" in ended.err
    words = Page(command.folder / "report.html").words
    assert "different base models: one began" in words and "“cat” is gone in 2 of 2 runs." in words


def test_a_report_replaces_a_report_and_nothing_else(command: Command, runs: Path) -> None:
    page(command, "cat")
    assert is_report(runs / "report.html")
    page(command, "eval")
    assert "eval" in Page(runs / "report.html").words
    (runs / "mine.html").write_text("<p>mine")
    ended = command("report", "cat", "--out", "mine.html")
    assert ended.code == 2 and "exists and is no report of esd" in ended.err
    assert (runs / "mine.html").read_text() == "<p>mine"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required: run"),
        (["nowhere"], "nowhere does not exist; give the run_dir of a finished run"),
        (["base"], "base holds no run of esd"),
        (["cat", "--out", "no/report.html"], "there is no folder no; make it"),
        (["cat", "--out", "cat"], "cat exists and is no report"),
        (["cat", "unfinished"], f"finish it with: {finished.COMMAND}"),
        (["noimages"], "images.csv cannot be read"),
        (["oddtable"], "images.csv is damaged"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_leave_no_report(
    command: Command, runs: Path, arguments: list[str], told: str
) -> None:
    finished.training(runs / "unfinished")
    (runs / "unfinished/summary.json").unlink()
    for name in ("noimages", "oddtable"):
        shutil.copytree(runs / "eval", runs / name)
    (runs / "noimages/images.csv").unlink()
    table = runs / "oddtable/images.csv"
    table.write_text(re.sub(r"0\.78\d+", "much", table.read_text()))
    before = command.files()
    ended = command("report", *arguments)
    assert ended.code == 2 and told in ended.err and len(ended.err.splitlines()) <= 2 and command.files() == before


def test_large_pictures_are_made_smaller(command: Command, runs: Path) -> None:
    for model in ("base", "erased"):
        for file in (runs / "eval" / model).glob("*.png"):
            Image.effect_noise((700, 500), 90).save(file)
    made = page(command, "eval")
    assert len(made.source) < 24 * 80_000 and len(made.all("img")) == 24


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>
for (const one of document.images) one.loading = "eager";
addEventListener("load", () => {
  const sizes = [...document.images].map(one => one.naturalWidth);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = JSON.stringify({sizes, wide, paper: getComputedStyle(document.body).backgroundColor});
});</script>"""


def browse(file: Path, profile: Path, *more: str) -> tuple[str, str]:
    """(the page as the browser has it, what it logged)."""
    quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update")
    flags = [f"--{name}" for name in ("headless", "no-sandbox", *quiet, "disable-sync", "enable-logging=stderr")]
    told = [*flags, f"--user-data-dir={profile}", "--virtual-time-budget=10000", *more, "--dump-dom", file.as_uri()]
    ended = subprocess.run([str(CHROMIUM), *told], capture_output=True, text=True, check=True, timeout=120)
    return ended.stdout, ended.stderr


@pytest.mark.slow(reason="starts a browser three times")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the report was not opened in a browser")
def test_a_browser_shows_every_picture_and_complains_of_nothing(command: Command, runs: Path, tmp_path: Path) -> None:
    finished.evaluation(runs / "nude", runs / "cat/erased.safetensors", nudity=True)
    for eta in (1.0, 2.0):
        finished.training(runs / f"sweep/{eta:g}", eta=eta)
    made = page(command, "cat", "eval", "nude", "attacks", "sweep")
    _, log = browse(runs / "report.html", tmp_path / "profile")
    assert "CONSOLE" not in log, log
    # the same page, let run a script that looks at it; that it can complain is shown by one that it does not let run
    look = made.source.replace("</body>", LOOK + "</body>")
    (runs / "forbidden.html").write_text(look, encoding="utf-8")
    assert "CONSOLE" in browse(runs / "forbidden.html", tmp_path / "profile")[1]
    allowed, replaced = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", look)
    assert replaced == 1
    (runs / "look.html").write_text(allowed, encoding="utf-8")
    for flags in ((), ("--window-size=500,900",), ("--blink-settings=preferredColorScheme=0",)):
        dom, log = browse(runs / "look.html", tmp_path / "profile", *flags)
        found = json.loads(re.search(r"<title>(.*?)</title>", dom)[1].replace("&quot;", '"'))  # type: ignore[index]
        assert len(found["sizes"]) == len(made.all("img")) > 50 and min(found["sizes"]) > 0
        assert found["wide"] <= 0, "nothing sticks out to the right"
        assert "CONSOLE" not in log, log
