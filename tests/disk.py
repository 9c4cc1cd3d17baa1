"""A disk that fills up, without filling one."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def small_disk() -> Iterator[None]:
    """No file of this process grows beyond 4096 bytes: the kernel fails the write part way through.

    Only around the calls under test: the runner's own output may be a longer file by then.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
