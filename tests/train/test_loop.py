"""The loop: who is called when, with what."""

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import pytest

from camelid.parallel.hosts import StopSignal
from camelid.train.loop import Callback, train
from camelid.train.state import TrainState
from tiny import tiny_config, tiny_params

PARAMS = tiny_params(tiny_config())


class Story(StopSignal):
    """A run of the loop that computes nothing and writes down what happens; no signal but `stop_after` ends it."""

    def __init__(self):
        super().__init__()
        self.events: list[Any] = []
        self.stop_after: int | None = None

    def run(self, steps: int, callbacks: list[Callback], first: int = 0) -> tuple[int, TrainState]:
        state = TrainState(jnp.int32(first), PARAMS, ())
        return train(self.step, state, self.batches(first, steps), self.report, callbacks, self)

    def batches(self, first: int, steps: int) -> Iterator[dict]:
        for number in range(first, steps):
            self.events.append(("batch", number))
            yield {"x": jnp.float32(number)}

    def step(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        made = int(state.step) + 1
        self.events.append(("step", made))
        return TrainState(jnp.int32(made), state.params, ()), {"loss": jnp.float32(made / 2), "weight": jnp.int32(made)}

    def report(self, step: int, numbers: dict) -> None:
        self.events.append(("report", step))
        assert numbers == {"loss": step / 2, "weight": step}
        assert {type(value) for value in numbers.values()} == {float, int}

    def at(self, step: int) -> bool:
        self.events.append(("stop?", step))
        return step == self.stop_after

    def note(self, name: str) -> Callable[[int, TrainState], None]:
        def do(step: int, state: TrainState) -> None:
            assert int(state.step) == step
            self.events.append((name, step))

        return do

    def of(self, *names: str) -> list[Any]:
        return [event for event in self.events if event[0] in names]

    def steps(self, name: str) -> list[int]:
        return [step for _, step in self.of(name)]


@pytest.fixture
def story() -> Story:
    return Story()


def test_every_step_is_made_reported_and_asked_about_once_in_order(story: Story):
    made, state = story.run(5, [])
    assert made == int(state.step) == 5
    for name in ("step", "report", "stop?"):
        assert story.steps(name) == [1, 2, 3, 4, 5]


def test_a_step_is_reported_when_the_next_is_on_its_way(story: Story):
    story.run(4, [])
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


def test_a_step_is_reported_before_its_callbacks(story: Story):
    """Whoever kills the process after a checkpoint must find the checkpoint's step in metrics.jsonl."""
    story.run(4, [Callback(2, story.note("save"))])
    assert story.of("report", "save") == [
        ("report", 1),
        ("report", 2),
        ("save", 2),
        ("report", 3),
        ("report", 4),
        ("save", 4),
    ]


def test_callbacks_run_at_their_steps_in_the_order_given(story: Story):
    story.run(6, [Callback(2, story.note("two")), Callback(3, story.note("three")), Callback(6, story.note("six"))])
    expected = [("two", 2), ("three", 3), ("two", 4), ("two", 6), ("three", 6), ("six", 6)]
    assert story.of("two", "three", "six") == expected


def test_what_runs_at_the_end_runs_once_whatever_the_last_step(story: Story):
    story.run(5, [Callback(2, story.note("end"), at_end=True), Callback(5, story.note("both"), at_end=True)])
    assert story.steps("end") == [2, 4, 5]
    assert story.steps("both") == [5]


def test_what_does_not_run_at_the_end_keeps_to_its_steps(story: Story):
    stops = Callback(2, story.note("stops"), at_stop=True)
    story.run(5, [Callback(2, story.note("plain")), Callback(9, story.note("never")), stops])
    assert story.steps("plain") == story.steps("stops") == [2, 4]
    assert story.steps("never") == []


def test_a_stop_ends_after_the_step_with_its_report_and_what_runs_at_a_stop(story: Story):
    story.stop_after = 3
    callbacks = [
        Callback(2, story.note("save"), at_end=True, at_stop=True),
        Callback(2, story.note("validate"), at_end=True),
        Callback(3, story.note("third"), at_stop=True),
    ]
    made, state = story.run(9, callbacks)
    assert made == int(state.step) == 3
    assert story.steps("step") == story.steps("report") == [1, 2, 3]
    assert story.steps("save") == [2, 3]
    assert story.steps("validate") == [2]
    assert story.steps("third") == [3]


def test_a_later_start_counts_from_the_steps_made_before(story: Story):
    made, _ = story.run(7, [Callback(3, story.note("save"), at_end=True)], first=4)
    assert made == 7
    assert story.steps("step") == story.steps("report") == [5, 6, 7]
    assert story.steps("save") == [6, 7]


def test_a_start_without_steps_left_does_nothing(story: Story):
    made, _ = story.run(4, [Callback(3, story.note("save"), at_end=True, at_stop=True)], first=4)
    assert made == 4
    assert story.events == []


# The signal ------------------------------------------------------------------------------


def test_a_signal_asks_to_stop_and_handlers_are_as_before_afterwards():
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        with StopSignal() as stop:
            assert not stop.at(1)
            signal.raise_signal(number)
            assert stop.at(2)
            assert stop.at(3)
        assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.at(1)
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
        assert stop.at(1)
    assert not ended


def test_the_step_after_which_it_stops_is_said(capsys: pytest.CaptureFixture[str]):
    threads = set(threading.enumerate())
    for made, said in ((None, 8), (8, 9), (10, 10)):
        with StopSignal(first=7, last=10) as stop:
            assert made is None or not stop.at(made)
            signal.raise_signal(signal.SIGINT)
        for thread in set(threading.enumerate()) - threads:
            thread.join()  # the one that says it
        assert capsys.readouterr().err.startswith(f"stopping after saving step {said};")
