"""A sequence being decoded: its tokens, and the results of the calculator that are put into it.

When the model has written a call, <|python_start|> expression <|python_end|>, the result follows in the
sequence as if it had been sampled. Its tokens are forced, and have mask 0 where sampled tokens have mask 1.
The row ends with <|assistant_end|> or <|bos|>.
"""

from collections import deque
from dataclasses import dataclass, field

from nanochat.calculator import calculate
from nanochat.decode.parts import PartTracker
from nanochat.tokenizer import RustBPETokenizer


@dataclass
class Completion:
    """The tokens of a row after its prompt, without the token that ended it."""

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1: sampled, 0: forced
    end_token: int | None = None  # None: the row reached max_tokens


def special_ids(tokenizer: RustBPETokenizer) -> dict[str, int]:
    """Return the ids of the special tokens that rows read or write."""
    names = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
    return {f"<|{name}|>": tokenizer.encode_special(f"<|{name}|>") for name in names}


class Row:
    """A completion in progress, which evaluates calculator calls and queues their results."""

    def __init__(self, tokenizer: RustBPETokenizer, special: dict[str, int]):
        self.tokenizer, self.special = tokenizer, special
        self.completion = Completion()
        self.last: tuple[int, int] = (special["<|bos|>"], 0)  # token and mask
        self.forced: deque[int] = deque()  # tokens to append before any more are sampled
        self._parts = PartTracker(tokenizer)
        self._call: list[int] = []  # tokens of the call so far

    @property
    def has_ended(self) -> bool:
        """True if the model has ended the row."""
        return self.completion.end_token is not None

    def append(self, sampled: int) -> None:
        """Append the next forced token, or the sampled one if none is forced."""
        token, mask = self.last = (self.forced.popleft(), 0) if self.forced else (sampled, 1)
        if mask and token in (self.special["<|assistant_end|>"], self.special["<|bos|>"]):
            self.completion.end_token = token
            return
        self.completion.tokens.append(token)
        self.completion.mask.append(mask)
        ended = self._parts.feed(token)
        if ended is None:
            if self._parts.type == "python":
                self._call.append(token)
            return
        if ended == "python" and token == self.special["<|python_end|>"]:
            self._force_result()
        self._call.clear()

    def _force_result(self) -> None:
        result = calculate(self.tokenizer.decode(self._call))
        if result is not None:
            start, end = self.special["<|output_start|>"], self.special["<|output_end|>"]
            self.forced.extend([start, *self.tokenizer.encode(result), end])
