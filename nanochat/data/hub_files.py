"""Files of the Hugging Face hub, checked: what data sets and models have in common.

HF_ENDPOINT is read when it is needed, not at import, so that another server can stand in for the hub.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BLOCK_BYTES = 1 << 20


def hub_api(token: str | None = None) -> HfApi:
    """Return the hub's client; without a token it takes the one that the user has logged in with, if any."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def download(api: HfApi, repo: str, name: str, digest: str | None, folder: Path, **where: Any) -> Path:
    """Download a file to folder/name; OSError if its SHA-256 is not `digest` (None: not stated by the hub).

    huggingface_hub goes on after a broken transfer and keeps what is whole, but compares lengths alone.
    """
    path = Path(api.hf_hub_download(repo, name, local_dir=folder, **where))
    if digest:
        with open(path, "rb") as file:
            found = sha256(file)
        if found != digest:
            path.unlink()
            raise OSError(f"{path.name} does not have the SHA-256 that the hub states")
    return path


def sha256(file: IO[bytes]) -> str:
    """Return the digest of the rest of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    for block in iter(partial(file.read, BLOCK_BYTES), b""):
        digest.update(block)
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """Return what an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
