"""MMLU: four-way multiple choice on 57 subjects, from abstract algebra to world religions.

auxiliary_train, which is there to learn from, holds 99,842 questions of other data sets (ARC, RACE, MC_TEST,
OBQA). The hub also has it as a subset of its own, whose rows are wrapped once more; it is read as a split of
the subset "all".

Source: Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding" (arXiv:2009.03300);
cais/mmlu on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.common import Bounds, Conversation, Task, render_mc
from tasks.hub import check_choice, load_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

LETTERS = ("A", "B", "C", "D")


class MMLU(Task):
    """14,042 test, 1531 validation, 285 dev (five a subject), 99,842 auxiliary_train."""

    eval_type = "categorical"

    def __init__(self, subset: str, split: str, *, path: Path | str | None = None, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        if subset == "auxiliary_train":
            raise ValueError(f'subset={subset!r} is a split here: subset="all", split="auxiliary_train"')
        check_choice("subset", subset, ("all",))
        check_choice("split", split, ("auxiliary_train", "dev", "validation", "test"))
        self.rows = load_rows("cais/mmlu", subset, split, ("question", "choices", "answer"), path)

    def num_examples(self) -> int:
        """See Task."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        row = self.rows[index]
        question, choices, answer = row["question"], row["choices"], row["answer"]
        has_four = isinstance(choices, list) and len(choices) == len(LETTERS)
        if not (has_four and isinstance(answer, int) and answer in range(len(LETTERS))):
            raise ValueError(
                f"the row of {question!r} has choices={choices!r}, answer={answer!r}: needs a list of four, "
                "and which of them is right, from 0 to 3"
            )
        return {
            "messages": [
                {"role": "user", "content": render_mc(question, LETTERS, choices)},
                {"role": "assistant", "content": LETTERS[answer]},
            ],
            "letters": list(LETTERS),
        }
