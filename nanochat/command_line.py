"""Command lines of scripts: parsing arguments, reporting errors, ending the process.

Nothing here runs at import time and nothing imports torch, so that `python -m scripts.NAME --help` is fast. A
script has this structure:

    def main(argv: Sequence[str] | None = None) -> int:
        config = parse(Config, argv)      # a frozen dataclass; tyro generates the command line from it
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
from contextlib import redirect_stderr
from types import ModuleType
from typing import Any, NoReturn, TypeVar

Config = TypeVar("Config")


def parse(config_class: type[Config], argv: Sequence[str] | None) -> Config:
    """Make a config from command-line arguments: `--depth=4`, `--device_batch_size 8` or with dashes.

    The help text is the docstring of the module that defines the config. Bad arguments raise ValueError.
    """
    import tyro

    description = sys.modules[config_class.__module__].__doc__
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(
                config_class, args=argv, description=description, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
    message = re.search("\u2502(.*?)\u2502 \u2500", box.getvalue(), re.DOTALL)  # in the box, above its rule
    text = message[1] if message else box.getvalue()
    raise ValueError(" ".join(text.replace("\u2502", " ").split()) + " (see --help)")


def require_at_least(config: Any, **least: int) -> None:
    """Raise ValueError if a setting is below its least value."""
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {minimum}")


def require_counts(config: Any, *names: str) -> None:
    """Raise ValueError if a setting is neither a number of things nor -1, which leaves it open."""
    for name in names:
        if getattr(config, name) < 1 and getattr(config, name) != -1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1, or -1")


def run(main: Callable[[], int]) -> None:
    """Run a script's main and exit; an error that the user can mend is one line on stderr and status 1."""
    is_main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main_rank else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    for library in ("httpx", "httpx2", "httpcore", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)
    mendable = () if os.environ.get("NANOCHAT_DEBUG") else (ValueError, OSError, FloatingPointError)
    status: int | str
    try:
        status = main()
        if _process_group() is not None:
            _process_group().barrier()
    except mendable as error:
        status = f"error: {error}"
    except KeyboardInterrupt:
        status = "interrupted"
    except Exception as error:
        if _process_group() is None:
            raise
        if _is_lost_rank(error):
            status = f"error: rank {_process_group().get_rank()} lost contact with another: {error}"
        else:
            traceback.print_exc()
            status = 1
    if _process_group() is not None:
        _leave_group(status)
    sys.exit(status)


def _process_group() -> ModuleType | None:
    """Return torch.distributed if this process is one of a group."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def _is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed since another rank has ended or, for NANOCHAT_TIMEOUT_S, not answered."""
    by_gloo = any(words in str(error) for words in ("/gloo/", "pair closure"))  # it has no class for them
    return by_gloo or isinstance(error, _process_group().DistError)


def _leave_group(status: int | str) -> NoReturn:
    """End a rank with what an exit does, but without finalising the interpreter.

    A thread of the collectives' library that wants Python's lock while the interpreter finalises, to drop a
    tensor say, is killed in the middle of C++ code. That aborts the process, though all its work is done.
    """
    if isinstance(status, str):
        sys.stderr.write(status + "\n")
        status = 1
    if status == 0:  # all ranks are past a barrier; if not, others may be stuck and are not waited for
        _process_group().destroy_process_group()
        threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
