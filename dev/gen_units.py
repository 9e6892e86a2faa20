"""Write conversations that teach a skill: units, converted with the calculator.

    python dev/gen_units.py > units.jsonl

An example to adapt: a reply is a list of parts, where "python" is a call of the calculator and
"python_output" its result. In a chat the model writes the call, and the calculator the result. Multiples of
seven are held out, to tell a model that has learned to convert from one that has memorised its examples.
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


def conversations(held_out: bool) -> Iterator[list[dict]]:
    """Yield the conversations to train on, or those with the held-out numbers."""
    for (small, large), factor in FACTORS.items():
        for n in range(2, 100):
            if (n % 7 == 0) is held_out:
                reply = [
                    {"type": "python", "text": f"{n}*{factor}"},
                    {"type": "python_output", "text": f"{n * factor}"},
                    {"type": "text", "text": f"{n * factor} {small}."},
                ]
                for question in QUESTIONS:
                    text = question.format(n=n, small=small, large=large)
                    yield [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of the docstring
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()  # only --help
    for messages in conversations(held_out=False):
        sys.stdout.write(json.dumps({"messages": messages}) + "\n")
