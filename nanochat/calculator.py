"""The calculator that the model may call while it writes.

The model writes an expression between <|python_start|> and <|python_end|>; the engine puts its value into the
stream between <|output_start|> and <|output_end|>. There are two kinds of expression:

    arithmetic         12 * (3.5 - 1) / 1,000
    counting letters   "strawberry".count("r")

The text comes from a model, and through it from anyone who talks to the model, so none of it is ever run:
Python parses it, and a walk over the tree evaluates the few kinds of node in a whitelist. No timeout is
needed, as there is no power operator and the length of the expression bounds every step. It is thread-safe.

Numbers are exact fractions, and only the result is rounded: 0.1 + 0.2 is 0.3, and 1 / 3 * 3 is 1.
"""

import ast
import operator
import re
import warnings
from decimal import Context, Decimal
from fractions import Fraction

MAX_LENGTH = 500  # characters of an expression; this bounds the nesting and the work too
LARGEST = 10**30  # absolute value of any intermediate result
MAX_DIGITS = 50  # characters of a result
SIGNIFICANT_DIGITS = 12  # of a result with a fraction; its integer part is always exact

_NAME = "<calculator>"  # file name in Python's messages about an expression
# Python's warnings about an expression would go to stderr. A filter for a while would not be thread-safe.
warnings.filterwarnings("ignore", module=_NAME)

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_TEXT_OR_COMMA = re.compile(r"""("[^"]*"|'[^']*')|(?<=\d),(?=\d{3}(?!\d))""")


def calculate(expression: str) -> str | None:
    """Return the value of an expression as text; None if it is not supported, too large or undefined."""
    if len(expression) > MAX_LENGTH:
        return None
    without_commas = _TEXT_OR_COMMA.sub(lambda match: match[1] or "", expression)  # 1,234 but not "1,234"
    try:
        source = without_commas.strip()
        text = _format(_evaluate(ast.parse(source, _NAME, mode="eval").body, source))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return text if len(text) <= MAX_DIGITS else None


def _evaluate(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            value = Fraction(number)
        case ast.Constant(value=float() as number):
            value = _decimal(number, ast.get_source_segment(source, node) or "")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_evaluate(left, source), _evaluate(right, source))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            value = _UNARY[type(op)](_evaluate(operand, source))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = Fraction(text.count(part))
        case _:
            raise ValueError(f"{type(node).__name__} is not part of the calculator")
    if abs(value) > LARGEST:
        raise ValueError("too large")
    return value


def _decimal(number: float, written: str) -> Fraction:
    """Return the decimal as written, not the nearest binary float; with an exponent, 17 digits of it.

    An exponent may have any size, so its power of ten is not computed before the float bounds it.
    """
    return Fraction(repr(number) if "e" in written.lower() else written.replace("_", ""))


def _format(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    context = Context(prec=max(SIGNIFICANT_DIGITS, len(str(int(abs(value)))) + 2))
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    return f"{context.normalize(quotient):f}"
