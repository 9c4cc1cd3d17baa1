"""The queue alone: order, positions, who leaves, and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from tests.web.conftest import wait_for
from var_ext.web.queue import DrawQueue, Event, Full, Job


@pytest.fixture
def queue() -> Iterator[DrawQueue]:
    queue = DrawQueue(2)
    yield queue
    queue.close()


class Client:
    """A job that gives an event each time it is let, and keeps what it was told."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.told: list[Event | None] = []
        self.go, self.closed = threading.Semaphore(0), threading.Event()
        self.name, self.order = name, order
        self.job = Job(self.work, self.told.append)

    def work(self) -> Generator[Event, None, None]:
        self.order.append(self.name)
        try:
            for i in range(2):
                assert self.go.acquire(timeout=30)
                yield {"event": i}
        finally:
            self.closed.set()

    def positions(self) -> list[int]:
        return [event["position"] for event in self.told if event and event["event"] == "queued"]


@pytest.fixture
def clients() -> Callable[[str], list[Any]]:
    order: list[str] = []
    return lambda names: [Client(name, order) for name in names]


def test_draws_in_order_and_tells_positions(queue: DrawQueue, clients: Callable[[str], list[Client]]) -> None:
    first, second, third, fourth = clients("abcd")
    queue.submit(first.job)
    wait_for(lambda: first.order)
    queue.submit(second.job)
    queue.submit(third.job)
    with pytest.raises(Full):
        queue.submit(fourth.job)
    for client in (first, second, third):
        client.go.release(2)
    wait_for(lambda: third.told and third.told[-1] is None)
    assert first.order == ["a", "b", "c"]
    assert [client.positions() for client in (first, second, third, fourth)] == [[0], [1], [2, 1], []]
    assert first.told[1:] == [{"event": 0}, {"event": 1}, None]


def test_who_leaves_is_not_drawn_for(queue: DrawQueue, clients: Callable[[str], list[Client]]) -> None:
    first, second, third = clients("abc")
    queue.submit(first.job)
    wait_for(lambda: first.order)
    queue.submit(second.job)
    queue.submit(third.job)
    queue.cancel(second.job)  # waits
    assert len(queue) == 1 and third.positions() == [2, 1]
    queue.cancel(first.job)  # is drawn
    first.go.release()
    wait_for(first.closed.is_set)
    third.go.release(2)
    wait_for(lambda: third.told[-1] is None)
    assert first.order == ["a", "c"]
    assert {"event": 0} not in first.told


def test_its_end_ends_all(clients: Callable[[str], list[Client]]) -> None:
    queue, (first, second) = DrawQueue(2), clients("ab")
    queue.submit(first.job)
    wait_for(lambda: first.order)
    queue.submit(second.job)
    first.go.release(2)
    queue.close()
    assert second.told[-1] is None and second.order == ["a"]
    with pytest.raises(Full):
        queue.submit(second.job)
