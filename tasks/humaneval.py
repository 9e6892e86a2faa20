"""HumanEval: 164 Python functions to write from signature and docstring, graded by running unit tests.

A base model continues the prompt with the body; a chat model writes the whole function, often in a Markdown
fence and without the helper functions of the prompt. Both are accepted. The strict judge, that of published
figures, accepts fewer forms.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (arXiv:2107.03374);
openai/openai_humaneval on the hub.
"""

from __future__ import annotations

import ast
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common import Bounds, Conversation, Task
from tasks.hub import load_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

RECENT = 64  # programs whose outcome is remembered: more than are judged at a time
_COLUMNS = ("prompt", "canonical_solution", "test", "entry_point")
_FENCED = re.compile(r"^ {0,3}```[^`\n]*\n(.*?)(?:^ {0,3}```|```\s*\Z|\Z)", re.DOTALL | re.MULTILINE)
_STRICTLY_FENCED = re.compile(r"```(?:python)?[ \t\r]*\n(.*?)```", re.DOTALL)
_BEFORE_A_BODY = re.compile(r"\A(?:(?!def |class |async |[ \t]+\S).*\n)*")

_NAME = "<completion>"  # file name in Python's warnings about a completion, which nobody would read
warnings.filterwarnings("ignore", module=_NAME)


class HumanEval(Task):
    """164 test."""

    def __init__(self, *, path: Path | str | None = None, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        self.rows = load_rows("openai/openai_humaneval", "openai_humaneval", "test", _COLUMNS, path)
        # both judges often find the same program in a reply, one after the other: it runs once
        self.succeeds = lru_cache(RECENT)(_succeeds)

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
        problem = conversation["problem"]
        return self._passes(problem, extract_code(problem, completion))

    def evaluate_strict(self, conversation: Conversation, completion: str) -> bool:
        """See evaluate and extract_strictly."""
        problem = conversation["problem"]
        return self._passes(problem, extract_strictly(problem, completion))

    def _passes(self, problem: dict[str, Any], code: str | None) -> bool:
        return code is not None and self.succeeds(program(problem, code))


def _succeeds(program: str) -> bool:
    from nanochat.execution import execute_code

    return execute_code(program).success


def program(problem: dict[str, Any], code: str) -> str:
    """Return a program that fails unless the code, a function or its body, is correct.

    A block `if __name__ == "__main__":` does not run, as in OpenAI's harness.
    """
    prompt, entry_point = problem["prompt"], problem["entry_point"]
    if _definition(problem).search(code):
        prompt = prompt[: prompt.rindex(f"def {entry_point}")]  # keep imports and helper functions
    name = '__name__ = "builtins"\n' if "__main__" in code else ""
    return f"{name}{prompt}{code}\n{problem['test']}\ncheck({entry_point})\n"


def extract_code(problem: dict[str, Any], completion: str) -> str | None:
    """Return the function, or else its body, that a completion gives; None if it gives neither.

    The function is the last fenced block that defines it and parses, or else the longest part of the
    completion that does; so is the body, which is indented and parses after the prompt. Fences are at the
    start of a line, and the last may lack its end.
    """
    texts = [*reversed(_FENCED.findall(completion)), completion]
    for text in texts[:-1]:
        if _definition(problem).search(text) and _parses(text):
            return text
    return _longest_function(problem, completion) or next(
        filter(None, (_longest_body(problem, text) for text in texts)), None
    )


def extract_strictly(problem: dict[str, Any], completion: str) -> str | None:
    """Return the function that the judge of the published figures finds, or None.

    It is the first fenced block, with an end and named python or not at all, or else the whole completion. A
    body is refused. What is not known of that judge is as in the fair one: helper functions of the prompt are
    kept, and `if __name__ == "__main__":` does not run.
    """
    fenced = _STRICTLY_FENCED.search(completion)
    code = fenced[1] if fenced else completion
    return code if _definition(problem).search(code) else None


def _definition(problem: dict[str, Any]) -> re.Pattern[str]:
    return re.compile(rf"^def {problem['entry_point']}\b", re.MULTILINE)


def _longest_function(problem: dict[str, Any], text: str) -> str | None:
    lines, definition = text.split("\n"), _definition(problem)
    for at in (i for i in reversed(range(len(lines))) if definition.match(lines[i])):
        for end in range(len(lines), at, -1):
            if _parses("\n".join(lines[at:end])):
                parts = ("\n".join(lines[start:end]) for start in range(at + 1))
                return next(filter(_parses, parts))
    return None


def _longest_body(problem: dict[str, Any], text: str) -> str | None:
    lines = _BEFORE_A_BODY.sub("", text, count=1).split("\n")
    if not lines[0].startswith((" ", "\t")):
        return None
    parts = ("\n".join(lines[:end]) for end in range(len(lines), 0, -1))
    return next((part for part in parts if _parses(problem["prompt"] + part)), None)


def _parses(code: str) -> bool:
    try:
        ast.parse(code, _NAME)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
