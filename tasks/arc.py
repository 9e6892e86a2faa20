"""ARC: questions of American science exams for grades 3 to 9, with three to five choices.

ARC-Challenge contains the questions that retrieval and word co-occurrence both get wrong, ARC-Easy the
others.

Source: Clark et al. 2018, "Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge"
(arXiv:1803.05457); allenai/ai2_arc on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.common import Bounds, Conversation, Task, render_mc
from tasks.hub import check_choice, load_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ARC(Task):
    """ARC-Easy: 2251 train, 570 validation, 2376 test; ARC-Challenge: 1119, 299, 1172."""

    eval_type = "categorical"

    def __init__(self, subset: str, split: str, *, path: Path | str | None = None, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        check_choice("subset", subset, ("ARC-Easy", "ARC-Challenge"))
        check_choice("split", split, ("train", "validation", "test"))
        self.rows = load_rows("allenai/ai2_arc", subset, split, ("question", "choices", "answerKey"), path)

    def num_examples(self) -> int:
        """See Task."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """See Task. Choices that an exam numbers 1, 2, ... keep their digits."""
        row = self.rows[index]
        question, choices, key = row["question"], row["choices"], row["answerKey"]
        match choices:
            case {"text": [*texts], "label": [*labels]} if len(texts) == len(labels) and key in labels:
                question = render_mc(question, labels, texts)
            case _:
                raise ValueError(
                    f"the row of {question!r} has choices={choices!r}, answerKey={key!r}: choices must be "
                    '{"text": [...], "label": [...]} of equal lengths, answerKey one of the labels'
                )
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": key},
            ],
            "letters": labels,
        }
