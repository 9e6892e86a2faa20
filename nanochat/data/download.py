"""Download shards of a data set from the Hugging Face hub; what has come is never fetched twice.

Bytes go to a hidden .partial file, which takes the shard's name when its length and SHA-256 are those that
the hub states. So a shard that has its name is whole, and a download resumes where it was cut, also after a
kill.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nanochat.data.hub_files import reason, sha256

logger = logging.getLogger(__name__)


def download_shard(
    repo: str,
    name: str,
    directory: Path,
    on_progress: Callable[[str, float], object] = lambda name, fraction: None,
    *,
    attempts: int = 6,
    timeout_s: float = 10.0,
    backoff_s: float = 1.0,
) -> None:
    """Download a shard of the hub unless it is there; OSError naming the shard if that fails.

    on_progress is told the name and what fraction of the shard is there. Each attempt goes on from the bytes
    that the last one left; one that sends nothing for timeout_s is given up. Waits of backoff_s, doubled each
    time, come between. A refusal (404, 401, ...) is not tried again. huggingface_hub finds, authorises and
    redirects; its own hf_hub_download forgets partial files and does not compare hashes, hence this loop.
    """
    import fcntl

    from huggingface_hub.utils import httpx

    path = directory / name
    with open(directory / f".{name}.partial", "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be fetching this very shard: let it
        if path.exists():
            Path(file.name).unlink(missing_ok=True)
            on_progress(name, 1.0)
            return
        for attempt in range(attempts):
            try:
                _transfer(repo, name, file, on_progress, timeout_s)
                os.replace(file.name, path)
                on_progress(name, 1.0)
                return
            except (httpx.HTTPError, OSError, EOFError) as error:
                told = f"{name}: {reason(error)}"
                if attempt == attempts - 1 or not _is_transient(error):
                    raise OSError(told) from error
            wait_s = backoff_s * 2**attempt
            logger.warning("%s; trying again in %g s", told, wait_s)
            time.sleep(wait_s)


def _transfer(
    repo: str, name: str, file: IO[bytes], on_progress: Callable[[str, float], object], timeout_s: float
) -> None:
    """Append to the partial file what it lacks and check it; EOFError if it is not what the hub states."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repo, name, repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT") or None)
    stated = get_hf_file_metadata(url, timeout=timeout_s)
    if not (stated.size and re.fullmatch("[0-9a-f]{64}", stated.etag or "")):
        raise OSError(f"{url} does not state a size and SHA-256 as the hub does; check HF_ENDPOINT")
    n_bytes = file.seek(0, os.SEEK_END)
    if n_bytes < stated.size:
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={n_bytes}-"}
        with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # a server without ranges starts again from the first byte
                file.seek(0)
                file.truncate()
            for block in response.iter_bytes():
                file.write(block)
                on_progress(name, file.tell() / stated.size)
        file.flush()
        os.fsync(file.fileno())
        n_bytes = file.tell()
    if n_bytes < stated.size:
        raise EOFError(f"{n_bytes} of {stated.size} bytes came")
    file.seek(0)
    if sha256(file) != stated.etag:
        file.truncate(0)
        raise EOFError("its bytes do not have the SHA-256 that the hub states")


def _is_transient(error: Exception) -> bool:
    """Whether another attempt may help: not with a full disk or a missing file, but with a busy server."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in (408, 429)
    return isinstance(error, (httpx.HTTPError, EOFError))
