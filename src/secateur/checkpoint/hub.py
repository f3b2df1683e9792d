"""Fetching a model from the Hugging Face hub, weights in safetensors form only."""

from __future__ import annotations

import errno
from pathlib import Path

from secateur.checkpoint.base import first_line
from secateur.errors import SourceError

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]


def fetch(repo: str, trust_remote_code: bool = False) -> Path:
    """Download (or find in the cache) the snapshot of ``repo``; return its local folder.

    Raises:
        SourceError: no such repository, no access, no network, or nothing but pickled weights.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    wanted = [*WANTED, "*.py"] if trust_remote_code else WANTED
    try:
        folder = Path(hub.snapshot_download(repo, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        raise SourceError(
            f"source {repo} is gated: accept its terms on its page, then hf auth login"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise SourceError(
            f"source {repo} is neither a folder here nor a repository on the hub: check the "
            "spelling, or log in with hf auth login if it is private"
        ) from error
    except Exception as error:  # network and hub errors are of many kinds
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk is told as such
        plain = isinstance(error, errors.LocalEntryNotFoundError)
        reason = "" if plain else f" ({first_line(error)})"
        raise SourceError(
            f"source {repo} is no folder here and the hub cannot be reached{reason}: check the "
            "network, or give a local folder or GGUF file"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise SourceError(
            f"source {repo} has no safetensors weights (pickled ones are not opened): convert it "
            "once, where you trust it, with transformers' save_pretrained, and give that folder"
        )
    return folder
