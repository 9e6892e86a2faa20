"""HumanEval on a problem defined here: correct and wrong completions."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from tasks.humaneval import HumanEval
from tests.helpers.vocabulary import train_tokenizer

PROBLEM = {
    "task_id": "x/0",
    "prompt": (
        "from math import floor\n\n\ndef double(x):\n    return 2 * x\n\n\n"
        'def double_floor(x):\n    """ Double, then floor.\n    >>> double_floor(1.6)\n    3\n    """\n'
    ),
    "canonical_solution": "    return floor(double(x))\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(1.6) == 3\n    assert candidate(-0.2) == -1\n",
    "entry_point": "double_floor",
}


@pytest.fixture
def executed():
    """The programs that the task runs."""
    return []


@pytest.fixture
def humaneval(tmp_path, monkeypatch, executed):
    """The task without a sandbox, since all completions are from this file."""

    def execute_code(code):
        executed.append(code)
        try:
            exec(compile(code, "program", "exec"), {"__name__": "__main__"})  # noqa: S102
        except Exception:  # noqa: BLE001
            return SimpleNamespace(success=False)
        return SimpleNamespace(success=True)

    module = ModuleType("nanochat.execution")
    module.execute_code = execute_code
    monkeypatch.setitem(sys.modules, "nanochat.execution", module)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PROBLEM))
    return HumanEval(path=path)


def test_conversation(humaneval):
    solution = f"```python\n{PROBLEM['prompt']}    return floor(double(x))\n```"
    (user, assistant) = humaneval[0]["messages"]
    assert user == {"role": "user", "content": PROBLEM["prompt"]}
    assert assistant == {"role": "assistant", "content": solution}
    tokenizer = train_tokenizer()
    ids, mask = tokenizer.render_conversation(humaneval[0])
    assert tokenizer.decode(ids[mask.index(1) :]) == solution + "<|assistant_end|>"
    assert humaneval.eval_type == "generative"
    assert humaneval.evaluate(humaneval[0], solution)


@pytest.mark.parametrize(
    "completion",
    [
        "    return floor(double(x))\n",
        "    return floor(double(x))\n\n\ndef double_floors():\n    pass\n",
        "```python\n    return floor(double(x))\n```",
        "Here:\n```python\ndef double_floor(x):\n    return floor(double(x))\n```\nIt works.",
        "```\ndef double_floor(x):\n    return floor(2 * x)\n```\n```\nraise SystemError\n```",
        "```py\ndef double_floor(x):\n    return floor(2 * x)\n",
        "```python \ndef double_floor(x):\n    return floor(2 * x)\n```",
        "```python\r\ndef double_floor(x):\r\n    return floor(2 * x)\r\n```",
        "```c++\ndef double_floor(x):\n    return floor(2 * x)\n```",
        "def double_floor(x):\n    return floor(double(x))",
        "import math\n\ndef double_floor(number: float) -> int:\n    return math.floor(double(number))",
    ],
)
def test_accepts_a_body_or_a_function_bare_or_fenced(humaneval, completion):
    assert humaneval.evaluate(humaneval[0], completion)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "    return round(double(x))\n",
        "```python\ndef double_floor(x):\n    return int(2 * x)\n```",
        "I do not know.",
        "```python\n```",
        "def double_floors(x):\n    return floor(2 * x)\n",
    ],
)
def test_refuses_wrong_completions(humaneval, completion):
    assert not humaneval.evaluate(humaneval[0], completion)


RIGHT = "def double_floor(x):\n    return floor(double(x))\n"
WRONG = "def double_floor(x):\n    return 0\n"


@pytest.mark.parametrize(
    ("completion", "fair", "strict"),
    [
        (f"```python\n{RIGHT}```", True, True),
        (f"```\n{RIGHT}```", True, True),
        (f"Here it is:\n```python\n{RIGHT}```\nIt works.", True, True),
        (RIGHT, True, True),
        (f"```python\n{RIGHT}```\nTo use it:\n```python\nprint(double_floor(1))\n```", True, True),
        (f"```py\n{RIGHT}```", True, False),
        (f"```python\n{RIGHT}", True, False),
        ("    return floor(double(x))\n", True, False),
        ("```python\n    return floor(double(x))\n```", True, False),
        (f"```bash\npip install numpy\n```\n```python\n{RIGHT}```", True, False),
        (f"```python\n{WRONG}```\nBetter:\n```python\n{RIGHT}```", True, False),
        (f"```python\n{RIGHT}```\nWorse:\n```python\n{WRONG}```", False, True),
        (f"```python\n{RIGHT}```\nAgain:\n```python\n{RIGHT}    if", True, True),  # cut off
        (f"Here is the function.\n\n{RIGHT}\nIt doubles and floors.", True, False),
        ("The body is:\n    return floor(double(x))\nwhich doubles it.", True, False),
        (f"Use this: ```python\n{RIGHT}```", True, True),
        ('def double_floor(x):\n    """\n    ```\n    """\n    return floor(double(x))\n', True, True),
        (
            f'```python\n{RIGHT}\nif __name__ == "__main__":\n    print(double_floor(input()))\n```',
            True,
            True,
        ),
        (f"```python\n{WRONG}```", False, False),
        ("def double_floor(x) return\n", False, False),
        ("", False, False),
    ],
)
def test_fair_and_strict_judge(humaneval, executed, completion, fair, strict):
    """What both find in the same form runs once: a program that runs until its timeout takes seconds."""
    assert humaneval.evaluate(humaneval[0], completion) is fair
    assert humaneval.evaluate_strict(humaneval[0], completion) is strict
    assert len(set(executed)) == len(executed)
