import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.calculator import LARGEST, MAX_LENGTH, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+1", "2"),
        (" 12 * (3.5 - 1)\n", "30"),
        ("6/2", "3"),
        ("7/2", "3.5"),
        ("2 - 3 * -4", "14"),
        ("-(5 - 5)", "0"),
        ("0 * -1.0", "0"),
        ("1,234 + 1", "1235"),
        ("1,234,567.5 * 2", "2469135"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3 * 3", "1"),
        ("10 / 3", "3.33333333333"),
        ("2 / 3", "0.666666666667"),
        ("1e3 / 4", "250"),
        (".5 + 1.", "1.5"),
        ("1 / 1,000,000,000", "0.000000001"),
        ("1234567890123.5 + 0", "1234567890123.5"),
        ("123456789 * 987654321 * 1000", "121932631112635269000"),
        ("123456789012345678901234567890.5", "123456789012345678901234567890.5"),  # its float has 17 digits
        ("1_234_567_890_123_456_789.25 - .25", "1234567890123456789"),
        ('"\u00e9\u00e9".count("\u00e9") * 98765432109876543210.5', "197530864219753086421"),
        ("1e-999999999", "0"),
        ("100000000000000000001 / 1", "100000000000000000001"),  # not representable as a float
        ('"strawberry".count("r")', "3"),
        ("'banana'.count('an') + 1", "3"),
        ('"1,234".count(",")', "1"),  # commas are removed only from numbers
        ('"it\'s 1,000".count("\'")', "1"),
        ('"abc".count("")', "4"),
    ],
)
def test_value(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1 +",
        "1,2",
        "7 // 2",
        "7 % 2",
        "2 ** 3",
        "1 / 0",
        "0.0 / (1 - 1)",
        "1e999",
        "1e999 - 1e999",
        "nan",
        "1e20 * 1e20",
        "1e-300",  # 302 characters are too many for a result
        "True",
        "1j",
        "x",
        "1 if 2 else 3",
        "1 < 2",
        "[1][0]",
        "(lambda: 1)()",
        "1 + '1'",
        "'1'",
        "-'1'",
        "'a' * 3",
        "'a'.upper()",
        "'a'.count",
        "'a'.count(1)",
        "'a'.count('a', 0)",
        "'a'.count(*'a')",
        "'a'.count(**{})",
        "'a'.__class__",
        "f'{1}'.count('1')",
        "b'a'.count(b'a')",
        "().__class__.__bases__[0].__subclasses__()",
        "__import__('os').system('true')",
        "(x := 1)",
        "import os",
        "1; 2",
        "9**9**9",
        "'a' * 10**10",
        "('a' * 10**10).count('a')",
        "1\0",
        "'\ud800'.count('a')",
    ],
)
def test_no_value(expression):
    assert calculate(expression) is None


@pytest.mark.parametrize("text", ["(" * 10_000 + "1" + ")" * 10_000, "-" * 100_000 + "1", "9" * 10_000])
def test_long_expressions_have_no_value(text):
    assert calculate(text) is None


def test_the_deepest_expressions_of_the_allowed_length_do_not_crash():
    parentheses = (MAX_LENGTH - 1) // 2
    assert calculate("(" * parentheses + "1" + ")" * parentheses) in ("1", None)
    assert calculate("-" * (MAX_LENGTH - 1) + "1") in ("-1", None)
    assert calculate("+".join("1" * (MAX_LENGTH // 2))) == str(MAX_LENGTH // 2)


def test_an_exhausted_stack_gives_no_value():
    def deeper(levels):
        return calculate("1" + "+1" * 200) if levels == 0 else deeper(levels - 1)

    frame, depth = sys._getframe(), 0
    while frame := frame.f_back:
        depth += 1
    assert deeper(sys.getrecursionlimit() - depth - 60) is None


def test_the_largest_number():
    assert calculate(f"{LARGEST} - 1 + 1") == str(LARGEST)
    assert calculate(f"{LARGEST} + 1 - 1") is None


def test_it_is_thread_safe():
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(calculate, [f"{n} * {n} / 4" for n in range(0, 200, 2)])
    assert list(results) == [str(n * n) for n in range(100)]


WITH_WARNINGS = r"""
from threading import Thread
from nanochat.calculator import calculate
thread = Thread(target=lambda: print(calculate(r'"a\w".count("w")'), calculate("1if 2 else 3")))
thread.start()
thread.join()
print(calculate(r'"a\d".count("d")'), calculate("0or 1"))
"""


def test_python_s_warnings_are_not_shown():
    """Text of the model went to stderr in warnings of Python's parser."""
    command = [sys.executable, "-W", "default", "-c", WITH_WARNINGS]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 None\n1 None\n", "")
