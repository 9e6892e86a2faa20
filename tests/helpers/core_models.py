"""A tokenizer and a model whose prompts and losses can be worked out by hand: bytes, and pairs of bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

BOS = 256


class ByteTokenizer:
    """Each byte of UTF-8 is a token; 256 is <|bos|>."""

    def get_bos_token_id(self):
        return BOS

    def encode(self, text, prepend):
        return [[prepend, *one.encode()] for one in text]


@dataclass
class PairModel:
    """Predict a byte from the one before; what `pairs` ("ab" -> probability) leaves is shared equally."""

    pairs: dict[str, float]
    sequence_len: int = 1000
    is_bounded: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    def __post_init__(self):
        self.table = torch.full((257, 257), torch.nan)
        for before in range(257):
            given = {ord(pair[1]): p for pair, p in self.pairs.items() if ord(pair[0]) == before}
            self.table[before] = (1 - sum(given.values())) / (257 - len(given))
            for after, p in given.items():
                self.table[before, after] = p
        self.lengths = []  # of the rows of each forward pass

    def batch_tokens(self, n_rows):
        return n_rows * self.sequence_len

    def position_logits(self, idx: Tensor, positions: Tensor):
        self.lengths.append(idx.size(1))
        yield self.table.log()[idx.flatten()[positions]]
