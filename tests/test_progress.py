"""What takes long says how far it is: at once on a terminal, and every half minute in a log."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from esd.analyze import counted
from esd.evaluation.generate import sample
from esd.progress import SELDOM, Log, bar
from tests import tiny


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as progress bars see it, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_terminal_sees_how_much_is_left(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with bar("base images", 4, unit="image") as progress:
        for _ in range(2):
            clock[0] += 3
            progress.update()
        assert re.search(r"base images:  50%.* 2/4 \[00:06<00:0[56], ", terminal.getvalue())


def test_a_log_gets_a_line_every_half_minute_and_none_of_short_work(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with bar("base images", 100, unit="image") as progress:
        for _ in range(29):
            clock[0] += 1
            progress.update()
    assert log.getvalue() == ""
    with bar("base images", 100, unit="image") as progress:
        for _ in range(95):
            clock[0] += 1
            progress.update()
        assert log.getvalue().count("base images:") == 95 // SELDOM


def test_a_line_leaves_no_half_a_bar_in_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar drawn before its time ends without a line break, and what is said next would stand behind it."""
    for stream, drawn in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with Log(tmp_path / "metrics.jsonl", 0, 1000, enabled=True) as log:
            for step in range(1, 8):
                log.write({"step": step, "loss": 0.5, "seconds": float(step)})
        assert "about 995 s left" not in stream.getvalue() and "about 17 minutes left\n" in capsys.readouterr().out
        assert ("training:" in stream.getvalue()) == drawn and stream.getvalue().endswith("\n" * drawn)


def test_no_bar_needs_a_whole_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sink:
        def write(self, text: str) -> int:
            return len(text)

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stderr", Sink())
    with bar("base images", 1, unit="image") as progress:
        progress.update()


def test_pictures_are_counted_where_they_are_given_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    settings = {"num_steps": 1, "guidance_scale": 1.0, "batch_size": 2}
    sample(tiny.pipeline(), ["a cat"] * 3, [0, 1, 2], **settings)
    assert terminal.getvalue() == ""
    sample(tiny.pipeline(), ["a cat"] * 3, [0, 1, 2], **settings, what="base images")
    assert "base images: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_an_analysis_counts_the_rows_of_its_denoiser_and_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    unet = tiny.pipeline().unet
    x, text = torch.zeros(3, 4, 8, 8), torch.zeros(3, 7, unet.config.cross_attention_dim)
    with pytest.raises(RuntimeError, match="stop"), counted(unet) as progress:
        unet(x, 1, encoder_hidden_states=text)
        unet(sample=x[:2], timestep=1, encoder_hidden_states=text[:2])
        assert progress.n == 5
        raise RuntimeError("stop")
    assert not unet._forward_pre_hooks
