"""metrics.jsonl goes on where a run goes on; the picture is a picture."""

import contextlib
import json
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from camelid.train.loggers import MetricsFile, Speed, Terminal, draw_losses, read_metrics, tokenizing


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, *steps: int, resume_from: int = 0) -> None:
    metrics = MetricsFile(path, resume_from)
    for step in steps:
        metrics.write({"step": step, "loss": step / 2})
    metrics.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_rows_are_on_disk_as_soon_as_they_are_written(path: Path):
    metrics = MetricsFile(path, 0)
    for step in (1, 2):
        metrics.write({"step": step})
        assert rows(path) == [{"step": n} for n in range(1, step + 1)]
    metrics.close()


def test_a_resumed_run_drops_what_it_will_do_again_and_keeps_the_rest(path: Path):
    written(path, 1, 2, 3, 4, 5)
    written(path, 4, 5, 6, resume_from=3)
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_run_that_starts_again_from_nothing_keeps_nothing(path: Path):
    written(path, 0, 1, 2)
    written(path, 0, 1, resume_from=0)
    assert [row["step"] for row in rows(path)] == [0, 1]


def test_a_line_that_a_kill_cut_short_is_left_out(path: Path):
    written(path, 1, 2)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    written(path, 3, resume_from=2)
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "content",
    [
        [{"step": step, "loss": 5 / step} for step in range(1, 30)],
        [{"step": 0, "validation_loss": 5.0}, {"step": 1, "loss": 4.0}, {"step": 1, "validation_loss": 4.5}],
        [{"step": 1, "loss": float("nan")}],
        [],
    ],
    ids=["losses", "with validation", "nan", "empty"],
)
def test_the_loss_curve_is_a_png(tmp_path: Path, content: list[dict]):
    draw_losses({"run": content}, tmp_path / "loss.png")
    image = (tmp_path / "loss.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", image[16:24])
    assert (width, height) == (960, 540)
    assert len(set(zlib.decompress(b"".join(chunks(image))))) > 10, "nothing is drawn"


def chunks(image: bytes) -> list[bytes]:
    """The pixels' chunks of a PNG, each with its checksum right."""
    found, place = [], 8
    while place < len(image):
        (length,), kind = struct.unpack(">I", image[place : place + 4]), image[place + 4 : place + 8]
        content = image[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + content) == struct.unpack(">I", image[place + 8 + length : place + 12 + length])[0]
        found += [content] if kind == b"IDAT" else []
        place += 12 + length
    return found


def test_without_a_terminal_about_twenty_plain_lines_are_printed(capsys: pytest.CaptureFixture[str]):
    terminal = Terminal(0, 100)
    for step in range(1, 101):
        numbers = {"loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1e4, "mfu": 0.5}
        terminal.show(step, numbers | {"step_s": 2.0, "data_s": 0.5 if step == 50 else 0.1, "eta_s": 3.0})
    terminal.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 20
    assert lines[9].endswith("MFU 50.0%  waits for data 25%  3 s left")
    assert lines[-1] == "step 100/100  loss 1.0000  lr 1.00e-03  10,000 tokens/s  MFU 50.0%  3 s left"
    assert "\x1b" not in err


def test_speed_counts_the_tokens_since_the_last_reading(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 10.5, 10.75, 11.0, 11.25, 12.0, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speed(first=5, steps=25, flops_per_token=3.0, peak_flops=6000.0)
    assert list(speed.timed(["batch"])) == ["batch"]
    first = {"tokens_per_second": 200.0, "mfu": 0.1, "step_s": 0.5, "data_s": 0.125, "eta_s": 8.0}
    assert speed.read(9, 100) == first
    later = speed.read(10, 100)
    assert later == {"tokens_per_second": 100.0, "mfu": 0.05, "step_s": 1.0, "data_s": 0.0, "eta_s": 15.0}
    assert not np.isnan(list(later.values())).any()


def test_speed_leaves_out_what_is_no_step(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 11.0, 111.0, 112.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speed(first=0, steps=10, flops_per_token=3.0, peak_flops=None)
    with speed.paused():
        pass  # 100 seconds
    now = speed.read(2, 100)
    assert (now["tokens_per_second"], now["step_s"], now["eta_s"]) == (100.0, 1.0, 8.0)


def test_on_a_terminal_the_bar_says_the_time_that_the_steps_take(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal(0, 100)
    assert terminal._bar is None
    numbers = {"loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1e4, "step_s": 2.0, "data_s": 0.1}
    terminal.show(5, numbers | {"eta_s": 190.2})
    assert terminal._bar is not None
    assert terminal._bar.tasks[0].description.endswith("10,000 tokens/s  0:03:10 left")
    terminal.close()


def test_an_error_before_the_first_step_is_not_printed_over_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    Terminal(0, 100).print("compiling")  # and here an error ends the program, or another process is the main one
    time.sleep(0.3)  # a bar is drawn anew ten times a second
    assert capsys.readouterr().err == "compiling\n"


def test_the_bar_has_ended_when_an_error_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    numbers = {"loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1e4, "step_s": 2.0, "data_s": 0.1, "eta_s": 1.0}
    with contextlib.suppress(KeyError), contextlib.closing(Terminal(0, 100)) as terminal:
        terminal.show(5, numbers)
        raise KeyError
    shown = capsys.readouterr().err
    assert shown.endswith("\n\x1b[?25h"), "the bar's last line has ended, and the cursor is back"
    print("camelid: an error", file=sys.stderr)
    time.sleep(0.3)
    assert capsys.readouterr().err == "camelid: an error\n"


def test_tokenizing_is_told_every_so_often(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = tokenizing(every=10.0)
    for now[0], done in ((105, 10_000_000), (111, 20_000_000), (120, 25_000_000), (121, 30_000_000)):
        progress(done, 40_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "tokenizing the text: 50% of 40 MB",
        "tokenizing the text: 75% of 40 MB",
    ]
