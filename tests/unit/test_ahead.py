"""Work of another thread: in order, one item ahead, and nothing is lost when it fails or stops."""

from __future__ import annotations

import threading

import pytest

from qpalette.core.ahead import ahead


def test_results_come_in_order_each_with_its_item():
    assert list(ahead(lambda n: n * n, range(5))) == [(n, n * n) for n in range(5)]
    assert list(ahead(lambda n: n, [])) == []


def test_another_thread_works_on_the_next_item_meanwhile():
    started = [threading.Event() for _ in range(3)]

    def function(n: int) -> str:
        started[n].set()
        return threading.current_thread().name

    for n, thread in ahead(function, range(3)):
        assert thread != threading.current_thread().name
        assert n == 2 or started[n + 1].wait(timeout=60)


def test_no_more_than_two_are_ahead_of_what_was_asked_for():
    done: list[int] = []
    results = ahead(done.append, range(100))
    next(results)
    next(results)
    results.close()
    assert done in ([0, 1], [0, 1, 2])


def test_an_error_comes_in_its_items_place():
    def function(n: int) -> int:
        if n == 2:
            raise OSError("no room")
        return n

    results = ahead(function, range(5))
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="no room"):
        next(results)


def test_what_was_begun_is_finished_when_the_next_item_cannot_be_had():
    finished: list[int] = []

    def items():
        yield from range(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ahead(finished.append, items()))
    assert finished == [0, 1, 2]
