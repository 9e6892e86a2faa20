"""The one downloader: files of the Hugging Face hub and of any web address, resumed after every break.

Bytes go to a partial file beside the target, with a note of their version: the digest of the hub, or the ETag
of another server. It takes the target's name when its length and digest are those that the server states, so
a file under its own name is complete. A transfer that broke, or whose process was killed, resumes at the byte
where it stopped. Bytes of two versions are never joined.

huggingface_hub authorises and redirects, but its own hf_hub_download keeps no partial files and compares no
digests. HF_ENDPOINT is read at each call, not at import, so that another server can stand in for the hub.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nanochat.data.partial_file import PartialFile, Version, open_partial

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import httpx

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20

Progress = Callable[[int, "int | None"], object]  # bytes that have arrived, bytes in all (None: not stated)
Result = TypeVar("Result")


def hub_api(token: str | None = None) -> HfApi:
    """Return the hub's client; without a token it uses that of HF_TOKEN or of the user's login, if any."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def hub_url(repo: str, name: str, *, repo_type: str = "model", revision: str | None = None) -> str:
    """Return the address of a file in a repository of the hub ("model" or "dataset")."""
    from huggingface_hub import hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    return hf_hub_url(repo, name, repo_type=repo_type, revision=revision, endpoint=endpoint)


def download(
    url: str,
    path: Path,
    *,
    is_hub: bool = False,
    on_progress: Progress | None = None,
    attempts: int = 6,
    timeout_s: float = 10.0,
    backoff_s: float = 1.0,
) -> None:
    """Download url to path, resuming at the bytes that earlier attempts and processes left.

    is_hub: url is a `hub_url`. The hub states a size and a digest, and the user's token is sent to it. A file
    that already has this digest is kept; any other file at `path` is replaced. Of other servers only the
    length is checked, if stated. One process at a time downloads to a path; others wait. on_progress=None
    shows a bar.

    An attempt that receives nothing for timeout_s fails. Raises OSError naming the file after `attempts`
    failures, or at once if another attempt cannot help (404, 401, a full disk).
    """

    def attempt() -> None:
        stated = _hub_version(url, timeout_s) if is_hub else None
        if stated and path.exists() and _has_digest(path, stated.tag):
            arrived.discard()
        else:
            _transfer(url, arrived, stated, show, timeout_s)
            _check_digest(arrived, stated)
            arrived.publish(path)
        size = path.stat().st_size
        show(size, size)

    path.parent.mkdir(parents=True, exist_ok=True)
    bar = _progress_bar(path.name) if on_progress is None else nullcontext(on_progress)
    with bar as show, open_partial(path) as arrived:
        retry(attempt, path.name, attempts=attempts, backoff_s=backoff_s)


def retry(action: Callable[[], Result], label: str, *, attempts: int = 6, backoff_s: float = 1.0) -> Result:
    """Return action(), called again after transient network errors; the waits between calls double.

    Raises OSError, `label: reason`, for the last error and for one that another attempt cannot change.
    """
    from huggingface_hub.utils import httpx

    n_failed = 0
    while True:
        try:
            return action()
        except (httpx.HTTPError, httpx.InvalidURL, OSError, EOFError) as error:
            n_failed += 1
            message = f"{label}: {one_line(error)}"
            if n_failed == attempts or not _is_transient(error):
                raise OSError(message) from error
        wait_s = backoff_s * 2 ** (n_failed - 1)
        logger.warning("%s; trying again in %g s", message, wait_s)
        time.sleep(wait_s)


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, with the value of HF_TOKEN replaced by ***."""
    text = " ".join(str(error).split()) or type(error).__name__
    token = os.environ.get("HF_TOKEN", "").strip()
    return text.replace(token, "***") if token else text


def _is_transient(error: Exception) -> bool:
    """Return whether another attempt may help: with a busy server, but not with a full disk."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status >= 500 or status in (408, 429)
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return False
    return isinstance(error, httpx.TransportError | EOFError)


@contextmanager
def _progress_bar(label: str) -> Iterator[Progress]:
    """Show a bar of bytes on a terminal."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="B", unit_scale=True, disable=None) as bar:

        def show(n_bytes: int, size: int | None) -> None:
            bar.total = size
            bar.initial = bar.initial if bar.n else n_bytes  # the speed is that of this process
            bar.update(n_bytes - bar.n)

        yield show


# ---------------------------------------------------------------------------------------------------------
# One attempt


def _hub_version(url: str, timeout_s: float) -> Version:
    """Return the size and the digest that the hub states: SHA-256 of large files, git SHA-1 of small ones."""
    from huggingface_hub import get_hf_file_metadata

    stated = get_hf_file_metadata(url, timeout=timeout_s)
    digest = stated.etag or ""
    if stated.size is None or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest):
        raise OSError(f"{url} does not state a size and a digest as the hub does; check HF_ENDPOINT")
    return Version(digest, stated.size)


def _response_version(response: httpx.Response, url: str) -> Version:
    """Return the version that a response of an ordinary server states; a weak ETag identifies no bytes."""
    headers = response.headers
    if headers.get("Content-Encoding"):  # a length and an ETag of the encoded bytes
        return Version("", None, url)
    etag = headers.get("ETag", "")
    tag = headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag
    size = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    return Version(tag, int(size) if size.isdigit() else None, url)


def _transfer(
    url: str, arrived: PartialFile, stated: Version | None, on_progress: Progress, timeout_s: float
) -> None:
    """Append the bytes that have not arrived; EOFError if the connection ends early or sends other bytes.

    `stated` is the version on the hub. Another server (None) states its own in the response; If-Range makes
    it send the whole file if that is not the version of the partial file.
    """
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    version = arrived.version
    if version is None or (version != stated if stated else version.url != url or not version.tag):
        arrived.restart(stated)
        version = stated
    start = arrived.n_bytes
    if version and start == version.size:  # the process ended before it could publish them
        return
    headers = {**(build_hf_headers() if stated else {}), "Accept-Encoding": "identity"}
    if version and start:
        headers["Range"] = f"bytes={start}-"
        if not stated:
            headers["If-Range"] = version.tag
    with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        answered = stated or _response_version(response, url)
        if response.status_code == 416 or (
            response.status_code == 206 and not (is_rest and answered == version)
        ):
            arrived.restart()
            raise EOFError(f"the server sent other bytes than those from {start} on; starting again")
        hf_raise_for_status(response)
        if response.status_code != 206:  # the whole file: it has changed, or the server knows no ranges
            arrived.restart(answered)
        for block in response.iter_bytes():
            arrived.append(block)
            on_progress(arrived.n_bytes, answered.size)
    if answered.size is not None and arrived.n_bytes != answered.size:
        raise EOFError(f"{arrived.n_bytes} of {answered.size} bytes came")


def _check_digest(arrived: PartialFile, stated: Version | None) -> None:
    """Drop the bytes and raise EOFError if they do not have the digest that the hub states."""
    if stated and not _has_digest(arrived.path, stated.tag):
        arrived.restart()
        kind = "SHA-256" if len(stated.tag) == 64 else "git SHA-1"
        raise EOFError(f"its bytes do not have the {kind} that the hub states")


def _has_digest(path: Path, digest: str) -> bool:
    """Return whether a file has a digest in hex: a SHA-256, or the SHA-1 that git gives a blob."""
    if len(digest) == 64:
        found = hashlib.sha256()
    else:
        found = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        for block in iter(partial(file.read, BLOCK_BYTES), b""):
            found.update(block)
    return found.hexdigest() == digest
