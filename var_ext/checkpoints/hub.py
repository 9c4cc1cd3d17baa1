"""Fetches files of repositories on the Hugging Face hub, or on the mirror that HF_ENDPOINT names, into the cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from var_ext.checkpoints.atomic import CheckpointError, first_line


def address(repository: str) -> str:
    """The address of a repository."""
    return f"{constants.ENDPOINT}/{repository}"


def fetch(repository: str, file: str, hint: str = "") -> Path:
    """A file of a hub repository, in the cache.

    Args:
        hint: further advice for the error.

    Raises:
        CheckpointError: it is not in the cache and cannot be fetched; names the address used.
    """
    from huggingface_hub import hf_hub_download  # its HTTP client takes long to import

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # its HTTP client's errors share no base class; each means: no file
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"could not get {file} of {address(repository)}{offline}: {first_line(error)}. "
            f"Without a network, fetch it on another machine with `hf download {repository} {file}` and copy the "
            f"cache folder to {constants.HF_HUB_CACHE} (or point HF_HUB_CACHE to it).{hint}"
        ) from error
