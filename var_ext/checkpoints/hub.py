"""Fetches files of repositories on the Hugging Face hub, or on the mirror that HF_ENDPOINT names, into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import constants

from var_ext.checkpoints.atomic import CheckpointError, first_line


def address(repository: str) -> str:
    """The address of a repository, with its "@REVISION" if it is pinned."""
    return f"{constants.ENDPOINT}/{repository}"


def pinned(name: str, revision: str) -> str:
    """A hub name with a revision: "owner/name" and "abc" -> "owner/name@abc".

    Raises:
        ValueError: it is pinned already, to another one.
    """
    repository, at, own = name.partition("@")
    if at and own != revision:
        raise ValueError(f"the revision must be given once, got {revision!r} and {name!r}")
    return f"{repository}@{revision}"


def fetch(repository: str, file: str, hint: str = "") -> Path:
    """A file of a hub repository, in the cache.

    Args:
        repository: "owner/name", or "owner/name@REVISION": a commit, a tag or a branch; without one, the newest.
        hint: further advice for the error.

    Raises:
        CheckpointError: it is not in the cache and cannot be fetched; names the address used.
    """
    from huggingface_hub import hf_hub_download  # its HTTP client takes long to import

    repository, _, revision = repository.partition("@")
    pin: Any = {"revision": revision} if revision else {}
    try:
        return Path(hf_hub_download(repository, file, **pin))
    except Exception as error:  # its HTTP client's errors share no base class; each means: no file
        command = f"hf download {repository} {file}{f' --revision {revision}' if revision else ''}"
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"could not get {file} of {address(repository)}{offline}: {first_line(error)}. "
            f"Without a network, fetch it on another machine with `{command}` and copy the "
            f"cache folder to {constants.HF_HUB_CACHE} (or point HF_HUB_CACHE to it).{hint}"
        ) from error
