"""Render conversations as tokens: the order of the parts, the training mask, and how long ones are cut.

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> text <|assistant_end|> <|user_start|> ...

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: user and assistant take turns, the user
first. A system message may come before them; its text goes in front of the first user text. Content is a
string; an assistant's may also be a list of parts {"type": ..., "text": ...} of the types "text", "python" (a
call of the calculator) and "python_output" (the result of the call). The mask is 1 on every token that the
assistant has to produce (text, calls, <|assistant_end|>) and 0 on all others, including results.

A conversation of more than max_tokens is cut so that it stays well formed:

- For training, whole exchanges (a user message and its reply) are kept from the start, so that every reply is
  learned with its whole context. For completion, the most recent exchanges are kept.
- If one exchange alone is too long, the user text loses its start until the reply fits, but keeps half of
  the room; then the reply loses its end with <|assistant_end|>, which would be learned too early there.
- For completion, the system text is kept: it goes in front of the oldest user text that is kept. If that is
  the last one and too long, the start of the system text takes at most half of the room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

_PART_TOKENS = {
    "text": (None, None),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}
PART_TYPES = tuple(_PART_TOKENS)


class Tokenizer(Protocol):
    """The methods of a tokenizer that rendering calls."""

    def get_bos_token_id(self) -> int: ...
    def encode_special(self, token: str, /) -> int: ...
    def encode(self, text: str, /, prepend: str | None = None, append: str | None = None) -> list[int]: ...


def part_boundaries(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the tokens that begin or end a part of a reply, each with the type of the part after it."""
    type_after: dict[int, str] = {}
    for part_type, (start, end) in _PART_TOKENS.items():
        if start is not None and end is not None:
            type_after[tokenizer.encode_special(start)] = part_type
            type_after[tokenizer.encode_special(end)] = "text"
    return type_after


def limit_reply(max_tokens: int, context: int, warn: Callable[[str], object] | None = None) -> int:
    """Return the largest number of tokens of a reply: max_tokens, but at most half of the context.

    The other half is the prompt's. `warn` is called with a message if the result is less than max_tokens.
    """
    half = context // 2
    if max_tokens > half and warn is not None:
        warn(f"replies have at most {half} tokens, half of the context, not {max_tokens}")
    return min(max_tokens, half)


@dataclass
class _Exchange:
    user: list[int]  # text without special tokens; in the first exchange, after the system text
    reply: list[int]  # from <|assistant_start|> on; empty without a reply
    reply_mask: list[int]


def render_conversation(
    tokenizer: Tokenizer, conversation: dict[str, Any], max_tokens: int
) -> tuple[list[int], list[int]]:
    """Return (ids, mask) of a conversation for training; ValueError if malformed or max_tokens < 6."""
    _, (first, *others) = _exchanges(tokenizer, conversation)
    ids, mask = [tokenizer.get_bos_token_id()], [0]
    for exchange in (_fit(first, max_tokens), *others):
        more_ids, more_mask = _render(tokenizer, exchange)
        if len(ids) + len(more_ids) > max_tokens:
            break
        ids += more_ids
        mask += more_mask
    return ids, mask


def render_for_completion(tokenizer: Tokenizer, conversation: dict[str, Any], max_tokens: int) -> list[int]:
    """Return the ids from <|bos|> to the <|assistant_start|> after the last user message.

    A reply to that message is left out, as the model has to write it. max_tokens is the context length minus
    the number of new tokens. ValueError as in render_conversation.
    """
    system, exchanges = _exchanges(tokenizer, conversation)
    exchanges[-1].reply, exchanges[-1].reply_mask = [tokenizer.encode_special("<|assistant_start|>")], [0]
    ids: list[int] = []  # of the exchanges that are kept
    later: list[int] = []  # the same without the system text, which belongs before an earlier exchange
    for exchange in reversed(exchanges):
        user = exchange.user if exchange is exchanges[0] else system + exchange.user
        oldest = replace(exchange, user=user)
        if not ids:
            oldest = _fit(oldest, max_tokens, len(system))
        more_ids, _ = _render(tokenizer, oldest)
        if 1 + len(more_ids) + len(later) > max_tokens:
            break
        ids = more_ids + later
        later = _render(tokenizer, exchange)[0] + later
    return [tokenizer.get_bos_token_id(), *ids]


def _exchanges(tokenizer: Tokenizer, conversation: dict[str, Any]) -> tuple[list[int], list[_Exchange]]:
    """Return the system text with the empty line after it, and the exchanges."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        expected = '{"messages": [{"role": ..., "content": ...}, ...]}'
        raise ValueError(f"a conversation must be {expected}, not {conversation!r:.200}")
    for index, message in enumerate(messages):
        if not message.get("content"):
            raise ValueError(f"message {index} is empty")
    turns_from = 0
    preface = ""
    if messages and messages[0].get("role") == "system":
        turns_from = 1
        preface = _string(messages[0]["content"], 0) + "\n\n"
    exchanges: list[_Exchange] = []
    for index, message in enumerate(messages[turns_from:], start=turns_from):
        content = message["content"]
        expected = ("user", "assistant")[(index - turns_from) % 2]
        if message.get("role") != expected:
            raise ValueError(
                f"message {index} has role {message.get('role')!r} and must have {expected!r}: user and "
                "assistant take turns, after an optional system message"
            )
        if expected == "user":
            text = ("" if exchanges else preface) + _string(content, index)
            exchanges.append(_Exchange(tokenizer.encode(text), [], []))
        else:
            exchanges[-1].reply, exchanges[-1].reply_mask = _reply(tokenizer, content, index)
    if not exchanges:
        raise ValueError(f"none of the {len(messages)} messages is the user's")
    return tokenizer.encode(preface), exchanges


def _reply(tokenizer: Tokenizer, content: Any, index: int) -> tuple[list[int], list[int]]:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    ids, mask = [tokenizer.encode_special("<|assistant_start|>")], [0]
    for part in parts:
        kind = part.get("type")
        if kind not in _PART_TOKENS:
            raise ValueError(
                f"message {index} has a part of type {kind!r}; there are {', '.join(_PART_TOKENS)}"
            )
        start, end = _PART_TOKENS[kind]
        part_ids = tokenizer.encode(_string(part.get("text"), index), prepend=start, append=end)
        ids += part_ids
        mask += [int(kind != "python_output")] * len(part_ids)
    return [*ids, tokenizer.encode_special("<|assistant_end|>")], [*mask, 1]


def _string(value: Any, index: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"message {index} has {value!r} and must have text")
    return value


def _fit(exchange: _Exchange, max_tokens: int, num_kept: int = 0) -> _Exchange:
    """Cut an exchange to max_tokens after <|bos|>; it keeps its first num_kept tokens, or half the room."""
    room = max_tokens - 3  # <|bos|>, <|user_start|>, <|user_end|>
    if room < 3:
        raise ValueError(f"max_tokens={max_tokens} must be at least 6: 4 special tokens, 1 of text each")
    kept = min(len(exchange.user), max(room - len(exchange.reply), room // 2))
    head = exchange.user[: min(num_kept, kept // 2)]
    return _Exchange(
        user=head + exchange.user[len(exchange.user) - kept + len(head) :],
        reply=exchange.reply[: room - kept],
        reply_mask=exchange.reply_mask[: room - kept],
    )


def _render(tokenizer: Tokenizer, exchange: _Exchange) -> tuple[list[int], list[int]]:
    start, end = tokenizer.encode_special("<|user_start|>"), tokenizer.encode_special("<|user_end|>")
    ids = [start, *exchange.user, end, *exchange.reply]
    return ids, [0] * (len(exchange.user) + 2) + exchange.reply_mask
