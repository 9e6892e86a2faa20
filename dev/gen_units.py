"""Write conversations that teach a skill: units, converted with the calculator.

    python dev/gen_units.py > units.jsonl

An example to change: a reply is a list of parts, of which "python" is a call of the calculator and
"python_output" its result. When the model talks, the call is its own and the result is the calculator's.
Numbers that seven divides are kept back, to see whether it has learned to convert or learned by heart.
"""

import argparse
import json
import sys
from collections.abc import Iterator

FACTORS = {
    ("minutes", "hours"): 60,
    ("hours", "days"): 24,
    ("days", "weeks"): 7,
    ("months", "years"): 12,
    ("seconds", "minutes"): 60,
    ("centimetres", "metres"): 100,
    ("eggs", "dozens"): 12,
}
QUESTIONS = (
    "How many {small} are {n} {large}?",
    "{n} {large} in {small}?",
    "Convert {n} {large} to {small}.",
)


def conversations(kept_back: bool) -> Iterator[list[dict]]:
    """Yield the conversations to learn from, or those with the numbers that are kept back."""
    for (small, large), factor in FACTORS.items():
        for n in range(2, 100):
            if (n % 7 == 0) is kept_back:
                reply = [
                    {"type": "python", "text": f"{n}*{factor}"},
                    {"type": "python_output", "text": f"{n * factor}"},
                    {"type": "text", "text": f"{n * factor} {small}."},
                ]
                for question in QUESTIONS:
                    text = question.format(n=n, small=small, large=large)
                    yield [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


if __name__ == "__main__":
    as_it_is = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is).parse_args()  # there are none
    for messages in conversations(kept_back=False):
        sys.stdout.write(json.dumps({"messages": messages}) + "\n")
