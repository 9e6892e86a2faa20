"""A sequence being decoded: what its model wrote, and the calculator's part in it.

When a row writes a calculator call, <|python_start|> expression <|python_end|>, the result is put in its
stream as if it had been sampled: those tokens are forced, and marked 0 in the masks that say what the model
itself wrote. A row ends with <|assistant_end|> or <|bos|>.
"""

from collections import deque
from dataclasses import dataclass, field

from nanochat.calculator import calculate
from nanochat.tokenizer import RustBPETokenizer


@dataclass
class Completion:
    """What a row's model wrote after the prompt, without the token that ended it."""

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1: sampled, 0: forced, a result of the calculator
    end_token: int | None = None  # what it ended with; None: max_tokens were reached


def special_ids(tokenizer: RustBPETokenizer) -> dict[str, int]:
    """Return the ids of the special tokens that a row takes notice of."""
    names = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
    return {f"<|{name}|>": tokenizer.encode_special(f"<|{name}|>") for name in names}


class Row:
    """A completion in the making: notices calculator calls and queues their results."""

    def __init__(self, tokenizer: RustBPETokenizer, special: dict[str, int]):
        self.tokenizer, self.special = tokenizer, special
        self.completion = Completion()
        self.last: tuple[int, int] = (special["<|bos|>"], 0)  # token and mask
        self.forced: deque[int] = deque()
        self.call: list[int] | None = None  # tokens since <|python_start|>

    @property
    def has_ended(self) -> bool:
        """Whether the model ended it."""
        return self.completion.end_token is not None

    def take(self, sampled: int) -> None:
        """Go on by the sampled token, or by one that is forced."""
        token, mask = self.last = (self.forced.popleft(), 0) if self.forced else (sampled, 1)
        special = self.special
        if mask and token in (special["<|assistant_end|>"], special["<|bos|>"]):
            self.completion.end_token = token
            return
        self.completion.tokens.append(token)
        self.completion.mask.append(mask)
        if token == special["<|python_start|>"]:
            self.call = []
        elif token == special["<|python_end|>"] and self.call is not None:
            result = calculate(self.tokenizer.decode(self.call))
            if result is not None:
                start, end = special["<|output_start|>"], special["<|output_end|>"]
                self.forced.extend([start, *self.tokenizer.encode(result), end])
            self.call = None
        elif self.call is not None:
            self.call.append(token)
