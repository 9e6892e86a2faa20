"""Command lines of scripts: parsing arguments, reporting errors, ending the process.

Nothing here runs at import time and nothing imports torch, so that `python -m scripts.NAME --help` is fast. A
script has this structure:

    def main(argv: Sequence[str] | None = None) -> int:
        config = parse(Config, argv)  # Config is a frozen dataclass; tyro generates the command line from it
        runtime = setup_runtime(config.device_type)
        ...

    if __name__ == "__main__":
        run(main)
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from functools import partial
from types import ModuleType
from typing import NoReturn, TypeVar

Config = TypeVar("Config")


def parse(
    config_class: type[Config],
    argv: Sequence[str] | None,
    description: str | None = None,
    default: Config | None = None,
) -> Config:
    """Parse command-line arguments such as `--depth=4`, `--device_batch_size 8` or `--device-batch-size 8`.

    The help text starts with description, by default the docstring of the module that defines config_class.
    What is not given is as in `default`, or as in the class if that is None. Raise ValueError for invalid
    arguments; argv None means sys.argv[1:].
    """
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    read = partial(
        tyro.cli,
        config_class,
        description=description or sys.modules[config_class.__module__].__doc__,
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    stderr = io.StringIO()
    try:
        with redirect_stderr(stderr):
            return read(args=argv)
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
    # tyro prints the message inside a box, above a horizontal rule
    message = re.search("\u2502(.*?)\u2502 \u2500", stderr.getvalue(), re.DOTALL)
    text = _one_line(message[1] if message else stderr.getvalue())
    if text.startswith("Unrecognized options"):
        unknown = set(re.findall(r"--[\w-]+", text))
        names = (arg.partition("=")[0] for arg in argv)
        # without their values, which hide the likeness to a known flag from tyro
        bare = [name if name in unknown else arg for name, arg in zip(names, argv, strict=True)]
        with redirect_stderr(stderr), suppress(SystemExit):
            read(args=bare)
        similar = re.findall(
            r"(?:you meant|similar to \S+): (?:-\w, )*(--[\w-]+)", _one_line(stderr.getvalue())
        )
        text += f"; did you mean {' or '.join(sorted(set(similar)))}?" if similar else ""
    raise ValueError(f"{text} (see --help)")


def _one_line(box: str) -> str:
    return " ".join(box.replace("\u2502", " ").split())


def require_at_least(config: object, **minima: int) -> None:
    """Raise ValueError if a setting is below its minimum."""
    for name, minimum in minima.items():
        if getattr(config, name) < minimum:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {minimum}")


def require_counts(config: object, *names: str) -> None:
    """Raise ValueError if a setting is neither a positive number nor -1, which means unset."""
    for name in names:
        if getattr(config, name) < 1 and getattr(config, name) != -1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1, or -1")


def run(main: Callable[[], int]) -> None:
    """Run a script's main and exit with its status.

    Errors that the user can fix (ValueError, OSError, FloatingPointError) are printed as one line on stderr,
    with status 1; with $NANOCHAT_DEBUG set they keep their traceback.
    """
    is_main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main_rank else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    for library in ("httpx", "httpx2", "httpcore", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)
    user_errors = () if os.environ.get("NANOCHAT_DEBUG") else (ValueError, OSError, FloatingPointError)
    status: int | str
    try:
        status = main()
        if (dist := _process_group()) is not None:
            dist.barrier()
    except user_errors as error:
        status = f"error: {error}"
    except KeyboardInterrupt:
        status = "interrupted"
    except Exception as error:
        if (dist := _process_group()) is None:
            raise
        if _is_lost_rank(error, dist):
            status = f"error: rank {dist.get_rank()} lost contact with another: {error}"
        else:
            traceback.print_exc()
            status = 1
    if (dist := _process_group()) is not None:
        _leave_group(status, dist)
    sys.exit(status)


def _process_group() -> ModuleType | None:
    """Return torch.distributed if this process has joined a process group, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def _is_lost_rank(error: Exception, dist: ModuleType) -> bool:
    """Return True if a collective failed because another rank ended or exceeded $NANOCHAT_TIMEOUT_S."""
    is_from_gloo = any(words in str(error) for words in ("/gloo/", "pair closure"))  # gloo has no error class
    return is_from_gloo or isinstance(error, dist.DistError)


def _leave_group(status: int | str, dist: ModuleType) -> NoReturn:
    """End a rank as sys.exit does, but without finalising the interpreter.

    A thread of the collectives' library that requests the GIL during finalisation, for example to release a
    tensor, is killed inside C++ code. That would abort a process whose work is done.
    """
    if isinstance(status, str):
        sys.stderr.write(status + "\n")
        status = 1
    if status == 0:  # all ranks have passed a barrier; after a failure others may hang: do not wait for them
        dist.destroy_process_group()
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # typeshed lacks it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
