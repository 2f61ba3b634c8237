"""Outputs for the metrics of a run: metrics.jsonl, the terminal, and a plot of the losses."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from camelid.disk.atomic import naming, write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

SHOWN_WAIT = 0.1  # fraction of a step's time from which waiting for data is shown


class MetricsFile:
    """metrics.jsonl, with one JSON object per line. Lines after the step `resume_from` are removed; 0 removes all.

    An infinite or NaN value is written as null, since JSON has neither; pandas and Polars read it as a missing value.
    """

    def __init__(self, path: Path, resume_from: int):
        earlier = read_metrics(path) if resume_from and path.exists() else []
        kept = [row for row in earlier if row["step"] <= resume_from]
        write_atomically(path, "".join(map(_line, kept)))
        self._path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        with naming(self._path):
            self._file.write(_line(row))

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a last line that is incomplete because the process was killed."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def tokenizing(every: float = 10.0) -> Callable[..., None]:
    """A function that prints the progress of reading text to standard error, at most once in `every` seconds.

    It is called with the number of bytes read, the total number, and optionally the name of the stage.
    """
    printed = time.monotonic()

    def progress(done: int, total: int, stage: str = "tokenizing", /) -> None:
        nonlocal printed
        if (now := time.monotonic()) - printed >= every:
            printed = now
            print(f"{stage} the text: {done / max(1, total):.0%} of {total / 1e6:,.0f} MB", file=sys.stderr)

    return progress


class Terminal:
    """A progress bar on a terminal; without a terminal, about twenty lines in the course of the run.

    The bar appears with the first metrics, so that only the process that shows them has one, and an error before the
    first step is not printed over it.
    """

    def __init__(self, first: int, steps: int):
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self._first, self._steps, self._every = first, steps, max(1, steps // 20)
        self._draws = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bar: Progress | None = None

    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a step: loss, learning_rate, those of Speed, and others if there are any."""
        text = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}"
        if "epoch" in metrics:
            text += f"  epoch {metrics['epoch']:.2f}  {metrics['tokens'] / 1e6:,.2f}M tokens"
        if about := rewards(metrics):
            text += f"  {about}"
        text += f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("mfu") is not None:
            text += f"  MFU {metrics['mfu']:.1%}"
        if (waited := metrics["data_s"] / metrics["step_s"]) > SHOWN_WAIT:
            text += f"  waits for data {waited:.0%}"
        if self._draws:
            self._bar = self._bar or self._started_bar()
            left = timedelta(seconds=round(metrics["eta_s"]))
            self._bar.update(self._task, completed=step, description=f"{text}  {left} left")
        elif step % self._every == 0 or step == self._steps:
            self.print(f"step {step}/{self._steps}  {text}  {metrics['eta_s']:.0f} s left")

    @contextlib.contextmanager
    def progress(self, what: str, total: int, every: float = 10.0) -> Iterator[Callable[[int], None]]:
        """Shows the progress of something beside the steps; gives a function of the number of items that are done.

        Without a terminal it prints a line at most once in `every` seconds.
        """
        bar, printed = self._bar or (self._new_bar() if self._draws else None), time.monotonic()
        task = None if bar is None else bar.add_task("", name=what, total=total)

        def show(done: int) -> None:
            nonlocal printed
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            elif (now := time.monotonic()) - printed >= every:
                printed = now
                self.print(f"{what}: {done:,} of {total:,}")

        if bar is not None:
            bar.start()
        try:
            yield show
        finally:
            if bar is not None and task is not None:
                bar.remove_task(task)
            if bar is not None and bar is not self._bar:
                bar.stop()

    def _started_bar(self) -> "Progress":
        bar = self._new_bar()
        self._task = bar.add_task("", name="train", total=self._steps, completed=self._first)
        bar.start()
        return bar

    def _new_bar(self) -> "Progress":
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        return Progress(
            TextColumn("{task.fields[name]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def rewards(metrics: Mapping[str, Any]) -> str:
    """The metrics of a preference loss as text; empty for other losses."""
    if "rewards/margins" not in metrics:
        return ""
    return f"reward accuracy {metrics['rewards/accuracies']:.1%}  margin {metrics['rewards/margins']:.3f}"


class Speed:
    """Measures the training speed since the last call of `read`, and estimates the remaining time.

    `step_s` is the mean time of a step in seconds, and `data_s` the part of it that was spent waiting for the batch: if
    that is a large part, the loader limits the speed.
    """

    def __init__(self, first: int, steps: int, flops_per_token: float, peak_flops: float | None):
        self._steps, self._flops, self._peak = steps, flops_per_token, peak_flops
        self._step, self._time, self._waited = first, time.perf_counter(), 0.0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time spent waiting for them is measured."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block from that of steps: for validation and checkpoints."""
        began = time.perf_counter()
        yield
        self._time += time.perf_counter() - began

    def read(self, step: int, tokens_per_step: int) -> dict[str, float | None]:
        """tokens_per_second, mfu, step_s, data_s and eta_s: means over the steps since the last call."""
        now, steps = time.perf_counter(), max(step - self._step, 1)
        seconds, waited = max(now - self._time, 1e-9) / steps, self._waited / steps
        self._step, self._time, self._waited = step, now, 0.0
        speed = tokens_per_step / seconds
        mfu = None if self._peak is None else speed * self._flops / self._peak
        left = (self._steps - step) * seconds
        return {"tokens_per_second": speed, "mfu": mfu, "step_s": seconds, "data_s": waited, "eta_s": left}


def draw_losses(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the training and validation losses of runs, by name, as a PNG; each run has a color."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    several = len(runs) > 1
    for number, (run, rows) in enumerate(runs.items()):
        run_name = run.replace("$", r"\$") + ": " if several else ""  # a $ starts a formula
        for order, (name, style) in enumerate((("loss", "-"), ("validation_loss", "o-"))):
            if points := [(row["step"], row[name]) for row in rows if row.get(name) is not None]:
                steps, losses = zip(*points, strict=True)
                color, width = f"C{number if several else order}", 1.0 if several and name == "loss" else 1.5
                axes.plot(steps, losses, style, color=color, lw=width, label=run_name + name.replace("_", " "))
    if axes.lines:
        axes.legend()
    pairs = any("rewards/margins" in row for rows in runs.values() for row in rows)
    axes.set(xlabel="step", ylabel="loss per pair" if pairs else "nats per token", title="Loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
