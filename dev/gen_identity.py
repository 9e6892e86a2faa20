"""Write conversations that give a model a name and a character, from a small persona file.

    python dev/gen_identity.py persona.yaml
    python dev/gen_identity.py persona.json --num=500 --seed=1 --out=identity.jsonl

A persona is YAML or JSON:

    name: Iberis
    maker: the people of the Garden
    style: friendly          # or plain, or formal
    facts:                   # topics ("tell me about your size") and the answers to them
      your size: I have 542 million parameters.
      the garden: The Garden is a small workshop in Sapporo.

Without --out the file is $NANOCHAT_BASE_DIR/identity_conversations.jsonl, which midtraining and finetuning
read. No model takes part: questions and answers are combined from the phrases below, so the same persona and
seed give the same file. No two conversations ask the same questions; a third of them have two to four turns.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from tyro.conf import Positional

from nanochat.common import atomic_write, base_dir, parse, run

logger = logging.getLogger(__name__)

OTHERS = ("ChatGPT", "GPT-4", "Claude", "Gemini", "Siri", "Alexa", "Llama", "Copilot")
OPENINGS = (
    "",
    "",
    "",
    "Hi! ",
    "Hello. ",
    "Hey, ",
    "Good morning. ",
    "Excuse me, ",
    "Quick question: ",
    "So, ",
)
MULTI_TURN_SHARE = 1 / 3

# subject -> (questions, answers); {name}, {maker}, {other}, {topic} and {fact} are filled in
SUBJECTS = {
    "name": (
        (
            *(
                "What is your name?",
                "Who are you?",
                "What are you called?",
                "Tell me your name.",
                "Your name?",
            ),
            *("What should I call you?", "Do you have a name?", "May I ask your name?", "What's your name?"),
            *("Who am I talking to?", "Introduce yourself.", "Please introduce yourself.", "And you are?"),
        ),
        ("I am {name}.", "My name is {name}.", "I am {name}, made by {maker}.", "You can call me {name}."),
    ),
    "maker": (
        (
            *(
                "Who made you?",
                "Who created you?",
                "Who built you?",
                "Who trained you?",
                "Who is your maker?",
            ),
            *(
                "Where do you come from?",
                "Which company made you?",
                "Who are your creators?",
                "Who is behind you?",
            ),
            *("Who developed you?", "Who do you belong to?", "Whose work are you?"),
        ),
        ("I was made by {maker}.", "{maker} made me.", "I am {name}, and I was made by {maker}."),
    ),
    "kind": (
        (
            *("What are you?", "Are you human?", "Are you a person?", "Are you a robot?", "Are you an AI?"),
            *("Am I talking to a machine?", "What kind of thing are you?", "Are you real?", "Are you alive?"),
        ),
        (
            "I am {name}, a language model made by {maker}.",
            "I am a language model. My name is {name}.",
            "I am a program that writes text, called {name}.",
        ),
    ),
    "other": (
        (
            *("Are you {other}?", "You are {other}, right?", "Is your name {other}?", "Hello {other}!"),
            *("Are you made by the people who made {other}?", "Is this {other}?", "Aren't you {other}?"),
        ),
        ("No, I am {name}.", "No, I am {name}, made by {maker}.", "No. My name is {name}, not {other}."),
    ),
    "fact": (
        (
            *("Tell me about {topic}.", "What about {topic}?", "What can you say about {topic}?"),
            *("I want to know about {topic}.", "Please explain {topic}.", "Say something about {topic}."),
            *("What do you know about {topic}?", "Could you tell me about {topic}?", "Describe {topic}."),
        ),
        ("{fact}",),
    ),
    "greeting": (
        ("Hi", "Hello", "Hey", "Hello there", "Good morning", "Good evening", "Hi there", "How are you?"),
        ("Hello! I am {name}.", "Hello, this is {name}.", "Hello. My name is {name}."),
    ),
}
STYLES = {  # sentences that may follow an answer
    "plain": ("",),
    "friendly": ("", " What can I do for you?", " I am glad you ask.", " Ask me anything!"),
    "formal": ("", " How may I be of service?", " I am at your disposal."),
}


@dataclass(frozen=True)
class Persona:
    """Name, maker, style and facts of a model; ValueError for values of other types or an unknown style."""

    name: str
    maker: str
    style: str
    facts: dict[str, str]

    def __post_init__(self) -> None:
        texts = {"name": self.name, "maker": self.maker}
        if not isinstance(self.facts, dict):
            raise ValueError(
                f"facts={self.facts!r} must map topics to answers, as in `your size: I have ...`"
            )
        for key, text in (*texts.items(), *self.facts.items(), *((topic, topic) for topic in self.facts)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{key}: {text!r} must be text, and not empty")
        if self.style not in STYLES:
            raise ValueError(f"style={self.style!r} must be one of {', '.join(STYLES)}")


def read_persona(path: Path) -> Persona:
    """Return the persona of a YAML or JSON file; ValueError naming the file if it holds none."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # JSON is YAML
        if not isinstance(fields, dict):
            raise ValueError("it needs the keys name and maker, and may have style and facts")
        return Persona(**{"style": "plain", "facts": {}, **fields})
    except (yaml.YAMLError, UnicodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a persona: {' '.join(str(error).split())}") from error


def exchange(persona: Persona, subject: str, opening: str, rng: random.Random) -> tuple[str, str]:
    """Return a random question on a subject, after its opening, and an answer to it."""
    questions, answers = SUBJECTS[subject]
    topic = rng.choice(sorted(persona.facts)) if persona.facts else ""
    words = {
        "name": persona.name,
        "maker": persona.maker,
        "other": rng.choice([other for other in OTHERS if other != persona.name]),
        "topic": topic,
        "fact": persona.facts.get(topic, ""),
    }
    question = opening + rng.choice(questions).format(**words)
    answer = rng.choice(answers).format(**words)
    # people leave out capitals and question marks
    question = rng.choice([question, question, question.lower(), question.rstrip("?.!")])
    return question, answer[0].upper() + answer[1:] + rng.choice(STYLES[persona.style])


def conversations(persona: Persona, num: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield num conversations, no two with the same questions; ValueError if there are fewer."""
    rng = random.Random(seed)
    subjects = [subject for subject in SUBJECTS if subject != "fact" or persona.facts]
    asked: set[Sequence[str]] = set()
    failures = 0
    while len(asked) < num:
        n_turns = rng.randint(2, min(4, len(subjects))) if rng.random() < MULTI_TURN_SHARE else 1
        chosen = sorted(rng.sample(subjects, n_turns), key=lambda subject: subject != "greeting")
        turns = [
            exchange(persona, subject, rng.choice(OPENINGS) if i == 0 and subject != "greeting" else "", rng)
            for i, subject in enumerate(chosen)
        ]
        questions = tuple(question for question, _ in turns)
        if questions in asked:
            failures += 1
            if failures > 100 * num:
                raise ValueError(
                    f"num={num}: the phrases make only about {len(asked)} different conversations; "
                    "lower num or add facts"
                )
            continue
        asked.add(questions)
        yield [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """Settings of the conversations to write."""

    persona: Positional[Path]
    """persona file, YAML or JSON"""
    num: int = 1000
    """number of conversations"""
    seed: int = 42
    """seed of the choice of phrases"""
    out: Path | None = None
    """file to write; by default $NANOCHAT_BASE_DIR/identity_conversations.jsonl"""
    overwrite: bool = False
    """replace the file if it exists"""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num={self.num} must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the conversations, one JSON object per line."""
    config = parse(IdentityConfig, argv)
    out = config.out or base_dir() / "identity_conversations.jsonl"
    if out.exists() and not config.overwrite:
        raise ValueError(f"{out} already exists: choose another --out, or replace it with --overwrite")
    persona = read_persona(config.persona)
    with atomic_write(out, "w") as file:
        for messages in conversations(persona, config.num, config.seed):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    logger.info(f"identity: {config.num} conversations of {persona.name} in {out}")
    return 0


if __name__ == "__main__":
    run(main)
