"""GSM8K: grade-school mathematics problems, solved in two to eight steps of arithmetic.

A solution annotates its calculations, "so 48/2 = <<48/2=24>>24 clips", and ends in "#### 72". Each annotation
becomes a call of the calculator and its result, so that the model need not calculate. Only the number after
#### is graded: by its value, or strictly by its text, as in published figures.

Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems" (arXiv:2110.14168);
openai/gsm8k on the hub.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.chat_format import PART_TYPES
from tasks.common import Bounds, Conversation, Task
from tasks.hub import check_choice, load_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

_CALCULATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")
_ANSWER = re.compile(
    r"""[\s*$]* ( [-+]? (?:\$\s*)?
        (?: (?: [0-9]{1,3} (?P<gap>[,\ \u00a0\u202f]) [0-9]{3} (?:(?P=gap)[0-9]{3})*  # 1,080 or 1 080
              | [0-9]+ ) (?:\.[0-9]*)?
          | \.[0-9]+ ) )
    (?! [.,]?\d  |  e[-+]?\d  |  x[0-9a-f]  |  (?:k|bn)\b  # more of a number, or a calculation
      | [ \t]* (?: (?: [-+*/^=:\u00d7\u00f7\u2212\u2013] | \\?(?:x|times|cdot|div)
                     | plus | minus | divided\ by ) [ \t]* )* \$? \.?\d )""",
    re.IGNORECASE | re.VERBOSE,
)
_STRICT_ANSWER = re.compile(r"#### ([-0-9.,]+)")


class GSM8K(Task):
    """7473 train, 1319 test. Solutions of the subset "socratic" ask a question before each step."""

    def __init__(self, subset: str, split: str, *, path: Path | str | None = None, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        check_choice("subset", subset, ("main", "socratic"))
        check_choice("split", split, ("train", "test"))
        self.rows = load_rows("openai/gsm8k", subset, split, ("question", "answer"), path)

    def num_examples(self) -> int:
        """See Task."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """See Task; the reply is a list of parts."""
        row = self.rows[index]
        # a pattern with two groups splits into text, expression, result, text, expression, result, ..., text
        pieces = enumerate(_CALCULATION.split(row["answer"]))
        parts = [{"type": PART_TYPES[i % 3], "text": piece} for i, piece in pieces if piece]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": parts},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """See is_correct_number."""
        return is_correct_number(conversation, completion)

    def evaluate_strict(self, conversation: Conversation, completion: str) -> bool:
        """See is_published_number."""
        return is_published_number(conversation, completion)


def is_correct_number(conversation: Conversation, completion: str) -> bool:
    """Return True if the number after #### in the completion equals that in the solution's last part."""
    answer = extract_answer(completion)
    return answer is not None and answer == extract_answer(_conclusion(conversation))


def is_published_number(conversation: Conversation, completion: str) -> bool:
    """Judge as the published figures do: numbers are equal if their texts are, without commas.

    A number is the first run of -0123456789., that follows "#### ": $72 is none, and 72.00 is not 72.
    """
    answers = [_STRICT_ANSWER.search(text) for text in (completion, _conclusion(conversation))]
    found = [match[1].replace(",", "") for match in answers if match]
    return len(found) == 2 and found[0] == found[1]


def _conclusion(conversation: Conversation) -> str:
    return conversation["messages"][-1]["content"][-1]["text"]


def extract_answer(text: str) -> Decimal | None:
    """Return the number after the first ####, or None: 1080 for "#### **$1,080.**" and "#### 1 080".

    Neither a fraction, a range, a time nor a calculation is a number: "3/4", "3-4", "3:40", "7 x 6 = 42". Nor
    is what only starts like one: "1,23", "1e5", "5k".
    """
    match = _ANSWER.match(text.partition("####")[2])
    return Decimal(re.sub(r"[^-+.0-9]", "", match[1])) if match else None
