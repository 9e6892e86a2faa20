"""HumanEval: 164 Python functions to write from signature and docstring, graded by running unit tests.

A base model continues the prompt with the body; a chat model writes the whole function, often in a Markdown
fence and without the helper functions of the prompt. Both are accepted.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv:2107.03374);
openai/openai_humaneval on the hub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import Bounds, Conversation, Task
from tasks.hub import load_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

_COLUMNS = ("prompt", "canonical_solution", "test", "entry_point")
_FENCED = re.compile(r"```[^`\n]*\n(.*?)(?:```|\Z)", re.DOTALL)  # the end may be missing


class HumanEval(Task):
    """164 test."""

    def __init__(self, *, path: Path | str | None = None, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        self.rows = load_rows("openai/openai_humaneval", "openai_humaneval", "test", _COLUMNS, path)

    def num_examples(self) -> int:
        """See Task."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """See Task; "problem" is the row of the data set."""
        row = self.rows[index]
        solution = f"```python\n{row['prompt']}{row['canonical_solution']}```"
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": solution},
            ],
            "problem": row,
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the tests pass; they run the completion in the sandbox nanochat.execution."""
        from nanochat.execution import execute_code

        return execute_code(program(conversation["problem"], completion)).success


def program(problem: dict[str, Any], completion: str) -> str:
    """Return a program that fails unless the completion (its first fenced block, if any) is correct."""
    fenced = _FENCED.search(completion)
    code = fenced[1] if fenced else completion
    prompt, entry_point = problem["prompt"], problem["entry_point"]
    if re.search(rf"^def {entry_point}\b", code, re.MULTILINE):
        prompt = prompt[: prompt.rindex(f"def {entry_point}")]  # keep imports and helper functions
    return f"{prompt}{code}\n{problem['test']}\ncheck({entry_point})\n"
