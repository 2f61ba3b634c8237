"""Where a run's numbers go: metrics.jsonl, the terminal, and a picture at the end."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from camelid.disk.atomic import write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

WORTH_SAYING = 0.1  # of a step's time


class MetricsFile:
    """metrics.jsonl: one JSON object a line; lines after the step that training resumes from are dropped (0: all).

    An infinite or NaN number is written as null, since JSON has none; pandas and Polars read that as a missing number.
    """

    def __init__(self, path: Path, resume_from: int):
        earlier = read_metrics(path) if resume_from and path.exists() else []
        kept = [row for row in earlier if row["step"] <= resume_from]
        write_atomically(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_line(row))

    def close(self) -> None:
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a killed process is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def tokenizing(every: float = 10.0) -> Callable[..., None]:
    """Prints the stage, the share of the bytes that is done, and the bytes in all to standard error every so often.

    `every` is in seconds. The result is called with bytes done, bytes in all and, optionally, the stage's name.
    """
    said = time.monotonic()

    def progress(done: int, total: int, stage: str = "tokenizing", /) -> None:
        nonlocal said
        if (now := time.monotonic()) - said >= every:
            said = now
            print(f"{stage} the text: {done / max(1, total):.0%} of {total / 1e6:,.0f} MB", file=sys.stderr)

    return progress


class Terminal:
    """A progress bar on a terminal; elsewhere a line about every twentieth of the run.

    The bar appears with the first metrics: only the process that shows these has one, and an error before the first
    step is not printed over it.
    """

    def __init__(self, first: int, steps: int):
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self._first, self._steps, self._every = first, steps, max(1, steps // 20)
        self._draws = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bar: Progress | None = None

    def show(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The newest metrics: loss, learning_rate, Speed's, and mfu where it is known."""
        text = f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}"
        text += f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("mfu") is not None:
            text += f"  MFU {metrics['mfu']:.1%}"
        if (waited := metrics["data_s"] / metrics["step_s"]) > WORTH_SAYING:
            text += f"  waits for data {waited:.0%}"
        if self._draws:
            self._bar = self._bar or self._started_bar()
            left = timedelta(seconds=round(metrics["eta_s"]))
            self._bar.update(self._task, completed=step, description=f"{text}  {left} left")
        elif step % self._every == 0 or step == self._steps:
            self.say(f"step {step}/{self._steps}  {text}  {metrics['eta_s']:.0f} s left")

    def _started_bar(self) -> "Progress":
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=self.console,
        )
        self._task = bar.add_task("", total=self._steps, completed=self._first)
        bar.start()
        return bar

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Speed:
    """Tokens a second since the last reading, and the time that is left for steps alone.

    data_s are the seconds of a step's step_s for which its batch was waited for: where they are many, the loader is the
    limit.
    """

    def __init__(self, first: int, steps: int, flops_per_token: float, peak_flops: float | None):
        self._steps, self._flops, self._peak = steps, flops_per_token, peak_flops
        self._step, self._time, self._waited = first, time.perf_counter(), 0.0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; how long each was waited for is counted."""
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
        """What is done meanwhile is no step: a validation, a checkpoint."""
        began = time.perf_counter()
        yield
        self._time += time.perf_counter() - began

    def read(self, step: int, tokens_per_step: int) -> dict[str, float | None]:
        now, steps = time.perf_counter(), max(step - self._step, 1)
        seconds, waited = max(now - self._time, 1e-9) / steps, self._waited / steps
        self._step, self._time, self._waited = step, now, 0.0
        speed = tokens_per_step / seconds
        mfu = None if self._peak is None else speed * self._flops / self._peak
        left = (self._steps - step) * seconds
        return {"tokens_per_second": speed, "mfu": mfu, "step_s": seconds, "data_s": waited, "eta_s": left}


def draw_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss curve as a PNG, validation beside training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style, label=name.replace("_", " "))
            axes.legend()
    axes.set(xlabel="step", ylabel="nats per token", title="Loss")
    axes.grid(alpha=0.3)
    figure.savefig(path)
