"""okd.clock: each second belongs to one part, and all of them together are the run's."""

import pytest

from okd import clock
from okd.clock import EVALUATING, LOSS, REST, STUDENT, Clock, timed


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns."""
    hands = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: hands[0])

    def passes(seconds):
        hands[0] += seconds

    return passes


def test_the_innermost_part_counts_and_the_sum_is_the_whole(now):
    with Clock() as running:
        now(1)
        with timed(LOSS):
            now(2)
            with timed(STUDENT):
                now(4)
            now(8)
        now(16)
        assert running.seconds() == {REST: 17, LOSS: 10, STUDENT: 4}
        now(32)
        assert running.seconds()[REST] == 49


def test_what_an_evaluation_does_is_the_evaluations(now):
    with Clock() as running, timed(EVALUATING):
        with timed(STUDENT):
            now(2)
        now(1)
    assert running.seconds() == {REST: 0, EVALUATING: 3}


def test_a_part_that_raises_is_left(now):
    with Clock() as running:
        with pytest.raises(KeyError), timed(LOSS):
            now(1)
            raise KeyError
        now(2)
        assert running.seconds() == {REST: 2, LOSS: 1}


def test_without_a_clock_nothing_is_kept():
    assert clock.running() is None
    with timed(LOSS):
        assert clock.running() is None
    with Clock() as outer:
        with Clock() as inner:
            assert clock.running() is inner
        assert clock.running() is outer
    assert clock.running() is None


class Event:
    """Of a GPU that is behind its host: passed when the test says so."""

    passed, made = 0, 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.made += 1
        self.at = Event.made

    def query(self):
        return self.at <= Event.passed

    def elapsed_time(self, other):
        assert other.query(), "read before it has passed: that would wait"
        return 1000.0 * (other.at - self.at)


def test_on_a_gpu_events_are_read_once_they_have_passed(monkeypatch):
    monkeypatch.setattr(clock.torch.cuda, "Event", Event)
    with Clock("cuda") as running:  # mark 1
        for _ in range(3):
            with timed(STUDENT):  # marks 2 and 3, 4 and 5, 6 and 7
                pass
        assert running.seconds() == {}
        Event.passed = 5
        assert running.seconds() == {REST: 2, STUDENT: 2}
        for _ in range(clock.BEHIND):
            Event.passed = Event.made
            with timed(STUDENT):
                pass
        assert len(running._marks) <= clock.BEHIND + 1
