"""CustomJSON: the user's own conversations, to teach a model an identity or a skill. A line is

    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Iberis."}]}

or the list of messages alone. Conversations keep the order of the file. All are checked when the file is
opened, so that errors are reported with their line before training, not hours into it.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.chat_format import PART_TYPES
from tasks.common import Bounds, Conversation, Task

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CustomJSON(Task):
    """The lines of a .jsonl or .jsonl.xz file."""

    def __init__(self, filepath: Path | str, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        path = Path(filepath).expanduser()
        self.conversations = []
        for number, value in json_lines(path):
            messages = value.get("messages") if isinstance(value, dict) else value
            try:
                check_messages(messages)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            self.conversations.append({"messages": messages})
        if not self.conversations:
            raise ValueError(f"{path} has no conversations; write at least one line")

    def num_examples(self) -> int:
        """See Task."""
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        return self.conversations[index]


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line of .jsonl or .jsonl.xz that is not blank.

    Raises ValueError, with the line number, for a line that is not JSON and for a corrupt file.
    """
    number = 0
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        except (UnicodeError, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} is corrupt after line {number} ({error})") from error


def check_messages(messages: Any) -> None:
    """Raise ValueError unless the chat format can render the messages and the last one is a reply."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('expected {"messages": [{"role": ..., "content": ...}, ...]} or the list alone')
    n_system = int(bool(messages) and messages[0].get("role") == "system")
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[(index - n_system) % 2] if index >= n_system else "system"
        if message.get("role") != expected:
            raise ValueError(
                f"message {index} has role {message.get('role')!r}, expected {expected!r}: user and "
                "assistant must alternate, after an optional system message"
            )
        content = message.get("content")
        has_parts = expected == "assistant" and isinstance(content, list) and content
        for text in map(_part_text, content) if has_parts else [content]:
            if not isinstance(text, str) or not text:
                raise ValueError(f"message {index} has content {text!r}, expected non-empty text")
            text.encode()  # JSON can encode lone surrogates, which are not text: UnicodeError
    if len(messages) == n_system or (len(messages) - n_system) % 2:
        raise ValueError(f"the last of the {len(messages)} messages must be from the assistant")


def _part_text(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
        raise ValueError(f"the type of part {part!r} must be one of {', '.join(PART_TYPES)}")
    return part.get("text")
