"""The page of the bundled digits: in memory, and behind a real server on a port of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from starlette.testclient import TestClient

import var_ext
from var_ext import Sampler
from var_ext.web import Limits, make_app


@pytest.fixture(scope="session")
def digits() -> Sampler:
    return var_ext.load("digits", precision="fp32")


@pytest.fixture(scope="module")
def client(digits: Sampler) -> Iterator[TestClient]:
    with TestClient(make_app(digits, "digits"), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def served(digits: Sampler) -> Iterator[Callable[[Limits], tuple[str, uvicorn.Server]]]:
    """Starts servers, and ends them: called with limits, it returns the address and the server."""
    started = []

    def start(limits: Limits) -> tuple[str, uvicorn.Server]:
        app = make_app(digits, "digits", limits)
        config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        started.append((server, thread))
        wait_for(lambda: server.started)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server

    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def wait_for(true: Callable[[], object], seconds: float = 30) -> None:
    """Until it is true; the time is for a machine that is busy, and no test depends on its length."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)
