"""Formatting of values and of Markdown for the report.

Interrupted runs need a report too, so every field is optional: a missing value, or one of the wrong type, is
shown as "-". Untrusted text (samples of a model, names of tasks) is fenced or escaped, so that it can neither
end a table nor open a tag.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite number that fits a float."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def dig(value: Any, *keys: str) -> Any:
    """Follow keys through nested objects; None if a key is missing or a value is not an object."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def entries(value: Any, *keys: str) -> dict[str, Any]:
    """Return the object that dig finds, or an empty one."""
    found = dig(value, *keys)
    return found if isinstance(found, dict) else {}


def items(value: Any, *keys: str) -> list[Any]:
    """Return the list that dig finds, or an empty one."""
    found = dig(value, *keys)
    return found if isinstance(found, list) else []


def show(value: Any, formatter: Callable[[Any], str] = str) -> str:
    """Format a value; return "-" for None and for values that the formatter rejects."""
    try:
        return "-" if value is None else formatter(value)
    except (TypeError, ValueError, OverflowError, OSError):  # time.gmtime raises OSError out of its range
        return "-"


def duration(seconds: float) -> str:
    """Format seconds as 3h15m, or as 4m07s below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def gib(n_bytes: int) -> str:
    """Format bytes as GiB."""
    return f"{n_bytes / 2**30:.1f} GiB"


def date(seconds: float) -> str:
    """Format seconds since the epoch as date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, padded to be readable as plain text.

    The first column is left-aligned, the others are right-aligned.
    """
    cells = [[escape(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)) + " |"
        for row in cells
    ]
    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def fence(text: str, language: str = "text") -> str:
    """Quote text in a code fence longer than any run of backticks in the text."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def escape(cell: str) -> str:
    """Escape characters that would end a cell or start a tag, a link or code; join lines."""
    return re.sub(r"[\\`*<\[|]", r"\\\g<0>", " ".join(cell.split()))


def printable(text: str) -> str:
    r"""Escape control characters (as \x1b), which terminals obey, and lone surrogates, which UTF-8 lacks."""
    unprintable = "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unprintable, lambda match: repr(match[0])[1:-1], text)
