"""HumanEval: 164 Python functions to write, given signature and docstring, each judged by running its tests.

A base model continues the prompt with a body; a chat model writes the whole function again, often fenced as
Markdown and without the helpers that the prompt defines. Both are taken.

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
_FENCED = re.compile(r"```[^`\n]*\n(.*?)(?:```|\Z)", re.DOTALL)  # it may be cut before its fence ends


class HumanEval(Task):
    """164 test."""

    def __init__(self, *, path: Path | str | None = None, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        self.rows = load_rows("openai/openai_humaneval", "openai_humaneval", "test", _COLUMNS, path)

    def num_examples(self) -> int:
        """See Task."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """See Task; the row itself comes along as "problem"."""
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
        """Whether the tests pass. Runs the completion, in the sandbox of nanochat/execution/__init__.py."""
        from nanochat.execution import execute_code

        return execute_code(program(conversation["problem"], completion)).success


def program(problem: dict[str, Any], completion: str) -> str:
    """Return the program that fails unless the completion (its first fenced block, if any) is right."""
    fenced = _FENCED.search(completion)
    code = fenced[1] if fenced else completion
    prompt, entry_point = problem["prompt"], problem["entry_point"]
    if re.search(rf"^def {entry_point}\b", code, re.MULTILINE):
        prompt = prompt[: prompt.rindex(f"def {entry_point}")]  # what is left: imports and helpers
    return f"{prompt}{code}\n{problem['test']}\ncheck({entry_point})\n"
