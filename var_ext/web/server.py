"""`serve`: the application under uvicorn."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from var_ext.sampling import Sampler
from var_ext.web.app import make_app
from var_ext.web.guard import is_loopback
from var_ext.web.limits import Limits


def serve(
    sampler: Sampler,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serves the page of a model until it is interrupted.

    Args:
        sampler: the model.
        name: what the page calls it.
        host: address to listen on. Any but the loopback is open to whoever reaches this machine: there is no password.
        port: 0 takes a free one.
        limits: bounds of requests; None: the defaults.
        say: is told the page's address, and a warning if others can reach it.

    Raises:
        ValueError: host and port cannot be listened on.
    """
    limits = limits or Limits()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=limits.connections)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror}): name another with --port, 0 takes a free one"
        ) from error
    app = make_app(sampler, name, limits, loopback_only=is_loopback(host))
    config = uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    if not is_loopback(host):
        say(f"warning: whoever reaches {host} can draw here; there is no password, and nothing is encrypted")
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    say(f"{name}: http://{shown}:{listening.getsockname()[1]}  (Ctrl-C ends it)")
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
