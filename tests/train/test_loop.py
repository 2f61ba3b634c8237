"""The loop over batches: in which order a run steps, logs, validates, saves and stops."""

import dataclasses
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from camelid.errors import UserError
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.run import train_steps
from camelid.train.config import TrainConfig
from camelid.train.loggers import Speed, Terminal
from camelid.train.metrics_log import MetricsLog
from camelid.train.save_schedule import SaveSchedule
from camelid.train.state import TrainState
from tiny import tiny_config, tiny_params

PARAMS = tiny_params(tiny_config())


class Story(StopSignal):
    """Every part of a run in one object: it computes nothing, and records what is called in which order.

    No signal but `stop_after` stops it.
    """

    def __init__(self):
        super().__init__()
        self.events: list[Any] = []
        self.stop_after: int | None = None
        self.not_finite: tuple[int, ...] = ()
        self.in_a_row = 0
        self.deviations: dict[int, float] = {}
        self.rows: list[dict] = []
        self.losses: dict[int, float] = {}
        self.best: Any = None

    def run(self, first: int = 0, validates: bool = True, **config: Any) -> TrainState:
        train = TrainConfig(**config)
        log = MetricsLog(train, Terminal(first, train.steps), Speed(first, train.steps, 1.0, None), [self], 1, str)
        validate: Any = self.validate if validates else None
        state, checkpoints = TrainState(jnp.int32(first), PARAMS, ()), self
        return train_steps(
            self.step,
            state,
            self.batches(first, train.steps),
            train,
            log,
            validate,
            checkpoints,
            self,  # type: ignore
            best=self.best,
        )

    def batches(self, first: int, steps: int) -> Iterator[dict]:
        for number in range(first, steps):
            self.events.append(("batch", number))
            yield {"x": jnp.float32(number)}

    def step(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        made = int(state.step) + 1
        self.events.append(("step", made))
        metrics = {"loss": made / 2, "weight": made, "gradient_norm": 1.0, "learning_rate": 0.1}
        self.in_a_row = self.in_a_row + 1 if made in self.not_finite else 0
        metrics |= {"skipped": float(self.in_a_row), "skipped_in_a_row": float(self.in_a_row)}
        metrics["loss_deviation"] = self.deviations.get(made, 0.0)
        metrics["gradient_norm"] = math.inf if made in self.not_finite else 1.0
        return TrainState(jnp.int32(made), PARAMS, ()), {name: jnp.asarray(value) for name, value in metrics.items()}

    def write(self, row: dict) -> None:
        if "validation_loss" in row:
            assert row == {"step": row["step"], "validation_loss": self.losses.get(row["step"], 1.5)}
            return
        self.events.append(("report", row["step"]))
        self.rows.append(row)
        assert (row["loss"], row["weight"]) == (row["step"] / 2, row["step"])
        assert {type(row["loss"]), type(row["weight"])} == {float, int}

    def validate(self, state: TrainState) -> dict[str, float]:
        self.events.append(("validate", int(state.step)))
        return {"loss": self.losses.get(int(state.step), 1.5)}

    def discard(self, step: int) -> None:
        self.events.append(("discard", step))

    def offer(self, step: int, loss: float, state: TrainState) -> None:
        self.events.append(("offer", (step, loss)))

    def save(self, step: int, state: TrainState) -> None:
        assert int(state.step) == step
        self.events.append(("save", step))

    def should_stop(self, step: int) -> bool:
        self.events.append(("stop?", step))
        return step == self.stop_after

    def of(self, *names: str) -> list[Any]:
        return [event for event in self.events if event[0] in names]

    def steps(self, name: str) -> list[int]:
        return [step for _, step in self.of(name)]


@pytest.fixture
def story() -> Story:
    return Story()


def test_every_step_is_made_reported_and_asked_about_once_in_order(story: Story):
    assert int(story.run(steps=5).step) == 5
    for name in ("step", "report", "stop?"):
        assert story.steps(name) == [1, 2, 3, 4, 5]


def test_a_step_is_reported_when_the_next_is_on_its_way(story: Story):
    story.run(steps=4)
    assert story.of("step", "report") == [
        ("step", 1),
        ("step", 2),
        ("report", 1),
        ("step", 3),
        ("report", 2),
        ("step", 4),
        ("report", 3),
        ("report", 4),
    ]


def test_only_every_nth_step_and_the_last_are_reported(story: Story):
    story.run(steps=8, log_every=3)
    assert story.steps("report") == [3, 6, 8]


def test_a_step_is_reported_before_it_is_saved_and_saved_before_it_is_validated(story: Story):
    """Whoever kills the process after a checkpoint must find the checkpoint's step in metrics.jsonl."""
    story.run(steps=4, checkpoint_every=2, evaluate_every=2)
    assert story.of("report", "validate", "save") == [
        ("report", 1),
        ("report", 2),
        ("save", 2),
        ("validate", 2),
        ("report", 3),
        ("report", 4),
        ("save", 4),
        ("validate", 4),
    ]


def test_validation_and_checkpoints_keep_to_their_steps(story: Story):
    story.run(steps=6, evaluate_every=2, checkpoint_every=3)
    expected = [("validate", 2), ("save", 3), ("validate", 4), ("save", 6), ("validate", 6)]
    assert story.of("validate", "save") == expected


def test_the_last_step_is_validated_and_saved_once_whatever_its_number(story: Story):
    story.run(steps=5, evaluate_every=2, checkpoint_every=4)
    assert story.steps("validate") == [2, 4, 5]
    assert story.steps("save") == [4, 5]


def test_without_evaluate_every_only_the_last_step_is_validated(story: Story):
    story.run(steps=5)
    assert story.steps("validate") == [5]


def test_without_validation_text_nothing_is_validated(story: Story):
    story.run(steps=4, evaluate_every=2, validates=False)
    assert story.steps("validate") == []
    assert story.steps("save") == [4]


def test_a_stop_ends_after_the_step_with_its_report_and_a_checkpoint(story: Story):
    """The validation may take long; the resumed run makes up for it."""
    story.stop_after = 4
    assert int(story.run(steps=9, checkpoint_every=3, evaluate_every=2).step) == 4
    assert story.steps("step") == story.steps("report") == [1, 2, 3, 4]
    assert story.steps("save") == [3, 4]
    assert story.steps("validate") == [2]


def test_a_stop_at_the_last_step_leaves_its_validation_to_the_resumed_run(story: Story):
    story.stop_after = 3
    story.run(steps=3, evaluate_every=2)
    assert story.steps("save") == [3]
    assert story.steps("validate") == [2]


def test_milestones_save_besides_checkpoint_every(story: Story):
    story.run(steps=12, checkpoint_every=8, milestones_every=5)
    assert story.steps("save") == [5, 8, 10, 12]


def test_the_clock_saves_besides_checkpoint_every_and_is_asked_seldom():
    now, asked = 0.0, 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        return now

    schedule, due = SaveSchedule(TrainConfig(steps=10**6, checkpoint_every=700, checkpoint_minutes=10), 0, clock), []
    for step in range(1, 2001):
        now += 1.0 if step < 1200 else 3.0  # seconds
        if schedule.due(step):
            due.append(step)
            schedule.saved(step)
    # 1235 is two steps late, because the steps became slower meanwhile.
    assert due == [600, 700, 1235, 1400, 1600, 1800, 2000]
    assert asked < 70


def test_a_checkpoint_whose_validation_loss_is_not_finite_is_discarded(story: Story):
    story.losses = {4: math.nan}
    with pytest.raises(UserError, match=r"^after step 4 the validation loss is nan"):
        story.run(steps=6, evaluate_every=2, checkpoint_every=2)
    assert story.of("save", "validate", "discard")[2:] == [("save", 4), ("validate", 4), ("discard", 4)]


def test_each_validated_step_is_offered_as_the_best_unless_updates_are_skipped(story: Story):
    story.best, story.losses, story.not_finite = story, {2: 3.0, 6: 2.0}, (4,)
    story.run(steps=6, evaluate_every=2, keep_best=True)
    assert story.of("offer") == [("offer", (2, 3.0)), ("offer", (6, 2.0))]


def test_a_stop_at_a_step_that_is_saved_anyway_saves_once(story: Story):
    story.stop_after = 4
    story.run(steps=9, checkpoint_every=2)
    assert story.steps("save") == [2, 4]


def test_while_updates_are_skipped_checkpoints_wait(story: Story):
    """The parameters may be the reason: checkpoints of them would replace the good ones."""
    story.not_finite = (4, 5, 7)
    story.run(steps=9, checkpoint_every=4)
    assert story.steps("save") == [6, 8, 9]
    assert story.steps("report") == list(range(1, 10))


def test_a_stop_and_the_end_save_although_the_update_was_skipped(story: Story):
    story.not_finite, story.stop_after = (3, 5), 3
    story.run(steps=5, checkpoint_every=9)
    assert story.steps("save") == [3]
    story.stop_after = None
    story.run(first=3, steps=5)
    assert story.steps("save") == [3, 5]


def test_a_run_that_ends_among_skipped_updates_is_not_finished(story: Story):
    story.not_finite = (3, 4)
    with pytest.raises(
        UserError, match=r"^step 4 has loss 2.0 and gradient norm inf, and the 1 updates before it were "
    ):
        story.run(steps=4, checkpoint_every=2)
    assert story.steps("save") == [2]


def test_more_skipped_updates_in_a_row_than_allowed_end_the_run(story: Story):
    story.not_finite = (2, 4, 5, 6, 7)
    with pytest.raises(
        UserError, match=r"^step 6 has loss 3.0 and gradient norm inf, and the 2 updates before it were "
    ):
        story.run(steps=9, max_skipped=2)
    # Steps are read when the next one is on its way.
    assert story.steps("step") == list(range(1, 8))
    assert story.steps("report") == list(range(1, 7))


def test_a_step_that_was_skipped_is_reported_whatever_log_every_is(story: Story, capsys: pytest.CaptureFixture[str]):
    story.not_finite = (4,)
    story.run(steps=9, log_every=6)
    assert story.steps("report") == [4, 6, 9]
    assert (
        "step 4: the update is skipped: loss 2.0, gradient norm inf (1 in a row, 1 in the run)"
        in capsys.readouterr().err
    )


def test_a_spike_is_reported_whatever_log_every_is_and_changes_nothing(
    story: Story, capsys: pytest.CaptureFixture[str]
):
    story.deviations = {3: 6.5, 5: 5.9}
    story.run(steps=9, log_every=4, checkpoint_every=3)
    assert story.steps("report") == [3, 4, 8, 9]
    assert story.steps("save") == [3, 6, 9]
    said = [line for line in capsys.readouterr().err.splitlines() if "deviations" in line]
    assert said == ["step 3: loss 1.5000 is 6.5 standard deviations above its mean"]
    assert [("loss_deviation" in row) for row in story.rows] == [True, False, False, False]


def test_the_average_is_validated_beside_the_parameters(story: Story):
    average, seen = tiny_params(tiny_config(), seed=1), []
    log = MetricsLog(TrainConfig(steps=1), Terminal(0, 1), Speed(0, 1, 1.0, None), [story], 1, str)
    log.validation = lambda step, *found: seen.append((step, *found))  # type: ignore

    def validate(state: TrainState) -> dict[str, float]:
        return {"loss": 2.5 if state.trainable is average else 1.5}

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        after, metrics = story.step(state, batch)
        return dataclasses.replace(after, ema=average), metrics

    state, checkpoints = TrainState(jnp.int32(0), PARAMS, (), ema=average), story
    train_steps(step, state, story.batches(0, 1), TrainConfig(steps=1), log, validate, checkpoints, story)  # type: ignore
    assert seen == [(1, {"loss": 1.5}, {"loss": 2.5})]


def test_a_validation_loss_of_the_average_that_is_not_finite_ends_the_run():
    rows: list[dict] = []
    log = MetricsLog(TrainConfig(steps=1), Terminal(0, 1), Speed(0, 1, 1.0, None), [Rows(rows)], 1, lambda: "Way out.")
    with pytest.raises(UserError, match=r"^after step 3 the validation loss of the moving average is nan\nWay out"):
        log.validation(3, {"loss": 1.5}, {"loss": math.nan})
    assert rows[0]["validation_loss"] == 1.5


class Rows:
    """A sink that keeps what is written."""

    def __init__(self, rows: list[dict]):
        self._rows = rows

    def write(self, row: Any) -> None:
        self._rows.append(dict(row))

    def close(self) -> None: ...


@pytest.mark.parametrize(("of_tokens", "about"), [(True, ", perplexity 4.48"), (False, "")])
def test_the_exponential_of_a_mean_over_rows_is_not_shown_as_perplexity(
    of_tokens: bool, about: str, capsys: pytest.CaptureFixture[str]
):
    log = MetricsLog(TrainConfig(steps=1), Terminal(0, 1), Speed(0, 1, 1.0, None), [], 1, str, None, of_tokens)
    log.validation(3, {"loss": 1.5}, {"loss": 1.25})
    assert capsys.readouterr().err == f"step 3: validation loss 1.5000{about}; of the moving average 1.2500\n"


def test_a_later_start_counts_from_the_steps_made_before(story: Story):
    assert int(story.run(first=4, steps=7, checkpoint_every=3, evaluate_every=6).step) == 7
    assert story.steps("step") == story.steps("report") == [5, 6, 7]
    assert story.steps("save") == [6, 7]
    assert story.steps("validate") == [6, 7]


def test_a_start_without_steps_left_does_nothing(story: Story):
    assert int(story.run(first=4, steps=4, checkpoint_every=3).step) == 4
    assert story.events == []


# The signal ------------------------------------------------------------------------------


def test_a_signal_asks_to_stop_and_handlers_are_as_before_afterwards():
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        with StopSignal() as stop:
            assert not stop.should_stop(1)
            signal.raise_signal(number)
            assert stop.should_stop(2)
            assert stop.should_stop(3)
        assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.should_stop(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_second_sigterm_lets_the_save_go_on():
    ended = False
    with StopSignal() as stop:
        try:
            for _ in range(2):  # launchers forward what the whole group has received already
                signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # which would end pytest
            ended = True
        assert stop.should_stop(1)
    assert not ended


def test_the_step_after_which_it_stops_is_said(capsys: pytest.CaptureFixture[str]):
    threads = set(threading.enumerate())
    for made, said in ((None, 8), (8, 9), (10, 10)):
        with StopSignal(first=7, last=10) as stop:
            assert made is None or not stop.should_stop(made)
            signal.raise_signal(signal.SIGINT)
        for thread in set(threading.enumerate()) - threads:
            thread.join()  # the one that says it
        assert capsys.readouterr().err.startswith(f"stopping after saving step {said};")
