"""MMLU: multiple choice with four options on 57 subjects, from abstract algebra to world religions.

The training split auxiliary_train has 99,842 questions of other data sets (ARC, RACE, MC_TEST, OBQA). It is
read as a split of the subset "all"; in the hub's subset auxiliary_train, rows are nested one level deeper.

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
    """14,042 test, 1531 validation, 285 dev (five per subject), 99,842 auxiliary_train."""

    eval_type = "categorical"

    def __init__(self, subset: str, split: str, *, path: Path | str | None = None, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        if subset == "auxiliary_train":
            raise ValueError(f'subset={subset!r} must be given as subset="all", split="auxiliary_train"')
        check_choice("subset", subset, ("all",))
        check_choice("split", split, ("auxiliary_train", "dev", "validation", "test"))
        self.rows = load_rows("cais/mmlu", subset, split, ("question", "subject", "choices", "answer"), path)

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
                f"the row of {question!r} has choices={choices!r}, answer={answer!r}: choices must be a list "
                "of four, answer the index of the correct one, from 0 to 3"
            )
        return {
            "messages": [
                {"role": "user", "content": render_mc(question, LETTERS, choices)},
                {"role": "assistant", "content": LETTERS[answer]},
            ],
            "subject": row["subject"],
            "letters": list(LETTERS),
        }
