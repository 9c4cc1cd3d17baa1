"""A real server: many at once, a full queue, clients that leave, and the command."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
import torch
import uvicorn
from click.testing import CliRunner

from tests.web.conftest import wait_for
from tests.web.test_app import same
from var_ext import Sampler
from var_ext.cli import main
from var_ext.web import Limits
from var_ext.web import server as server_module

Served = Callable[[Limits], tuple[str, uvicorn.Server]]


def post(address: str, what: str, body: dict[str, Any]) -> tuple[HTTPConnection, HTTPResponse]:
    connection = HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("POST", f"/api/{what}", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def events(answer: HTTPResponse) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.read().splitlines()]


def test_twenty_at_once_each_get_their_own(served: Served, digits: Sampler) -> None:
    address, _ = served(Limits())
    wanted = digits([i % 10 for i in range(20)], range(20))

    def one(i: int) -> bool:
        _, answer = post(address, "draw", {"label": i % 10, "seed": i})
        return answer.status == 200 and same(events(answer)[-2], wanted[i])

    with ThreadPoolExecutor(20) as users:
        assert all(users.map(one, range(20)))


@pytest.fixture
def held(digits: Sampler, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Each scale of a picture waits to be let."""
    let, stages = threading.Semaphore(0), digits.stages

    def slow(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
        for images in stages(*arguments, **options):
            let.acquire(timeout=30)
            yield images

    monkeypatch.setattr(digits, "stages", slow)
    yield let
    let.release(10**6)


def test_a_full_queue_says_when_to_come_again(served: Served, held: threading.Semaphore) -> None:
    address, server = served(Limits(waiting=1))
    queue = server.config.app.state.queue
    drawn = post(address, "draw", {"label": 1, "seed": 1})
    wait_for(lambda: queue.drawing and not len(queue))
    waiting = post(address, "draw", {"label": 2, "seed": 2})
    _, refused = post(address, "draw", {"label": 3, "seed": 3})
    assert refused.status == 503 and refused.headers["Retry-After"] == "5"
    assert "1 requests wait already: try again in a few seconds" in refused.read().decode()
    held.release(10**6)
    assert [events(answer)[-1]["event"] for _, answer in (drawn, waiting)] == ["done", "done"]


def test_who_leaves_frees_the_queue(served: Served, held: threading.Semaphore) -> None:
    """One that waits is gone at once; one that is being drawn after the next scale."""
    address, server = served(Limits(waiting=2))
    queue = server.config.app.state.queue
    drawn, answer = post(address, "draw", {"label": 1, "seed": 1})
    wait_for(lambda: queue.drawing and not len(queue))
    job = queue.drawing
    waiting = [post(address, "draw", {"label": 2, "seed": 2}) for _ in range(2)]
    assert len(queue) == 2
    for connection, its in waiting:
        its.close()
        connection.close()
    wait_for(lambda: not len(queue))
    answer.close()
    drawn.close()
    wait_for(job.cancelled.is_set)
    held.release()
    wait_for(lambda: queue.drawing is None)


def test_a_request_that_does_not_come_is_ended(served: Served) -> None:
    address, _ = served(Limits(body_seconds=0.2))
    connection = HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/api/draw")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 408 and b"must come within 0.2 s" in answer.read()
    connection.close()


def test_the_command_serves_until_it_is_interrupted() -> None:
    words = [sys.executable, "-m", "var_ext", "web", "--port", "0", "--threads", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"digits: (http://127\.0\.0\.1:\d+)", line)
        assert found, line
        _, answer = post(found[1], "draw", {"label": 1, "seed": 1})
        assert events(answer)[-1]["event"] == "done"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors


def test_another_host_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.uvicorn.Server, "run", lambda *_, **__: None)
    output = CliRunner().invoke(main, ["web", "--host", "0.0.0.0", "--port", "0"]).output
    assert "warning: whoever reaches 0.0.0.0 can draw here; there is no password" in output
    assert "warning" not in CliRunner().invoke(main, ["web", "--port", "0"]).output


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = CliRunner().invoke(main, ["web", "--port", str(port)])
    assert result.exit_code == 1
    assert (
        f"cannot listen on 127.0.0.1 port {port}" in result.output and "0 takes a free one" in result.output
    )


def test_without_the_extra_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("var_ext.web")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, ["web"])
    assert result.exit_code == 1 and "pip install 'var_ext[web]'" in result.output
