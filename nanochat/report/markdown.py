"""How the report writes values and Markdown.

A report must come of a run that broke off, too, so no field is taken for granted: what is absent or of the
wrong kind is "-". Text that is not ours (a model's samples, names of tasks) is fenced or escaped, so that it
can neither end a table nor open a tag.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def is_number(value: Any) -> bool:
    """Whether this is a finite number, of a size that can be computed with."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def dig(value: Any, *keys: str) -> Any:
    """Follow keys through nested objects; None where there is no such key or no object."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def entries(value: Any, *keys: str) -> dict[str, Any]:
    """Like dig, for an object: empty where there is none."""
    found = dig(value, *keys)
    return found if isinstance(found, dict) else {}


def items(value: Any, *keys: str) -> list[Any]:
    """Like dig, for a list: empty where there is none."""
    found = dig(value, *keys)
    return found if isinstance(found, list) else []


def show(value: Any, form: Callable[[Any], str] = str) -> str:
    """Format a value; "-" if it is absent or of a kind that the format does not take."""
    try:
        return "-" if value is None else form(value)
    except (TypeError, ValueError, OverflowError, OSError):  # the last of a date too far away
        return "-"


def duration(seconds: float) -> str:
    """3h15m, or 4m07s below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def gib(n_bytes: int) -> str:
    """Bytes in GiB."""
    return f"{n_bytes / 2**30:.1f} GiB"


def date(seconds: float) -> str:
    """Seconds since the epoch as a date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table, the first column to the left, the others to the right, padded to be read as it is."""
    cells = [[escape(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)) + " |"
        for row in cells
    ]
    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def fence(text: str, language: str = "text") -> str:
    """Quote text in a fence that is longer than any that it holds."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def escape(cell: str) -> str:
    """Take its meaning from what would end a cell or start a tag, a link or code."""
    return re.sub(r"[\\`*<\[|]", r"\\\g<0>", " ".join(cell.split()))


def printable(text: str) -> str:
    r"""Spell out what terminals and UTF-8 trip over: control characters as \x1b, surrogates as \ud800."""
    unprintable = "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unprintable, lambda found: repr(found[0])[1:-1], text)
