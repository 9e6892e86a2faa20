"""chat_cli: what it shows, the history, the conversation, and the command."""

import io
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import engine
from nanochat.checkpoint_manager import checkpoint_dir, load_model, save_checkpoint
from nanochat.common import run
from nanochat.decode.running import decoder_for
from nanochat.engine import Engine
from nanochat.sampling import GREEDY, SamplingParams
from scripts import chat_cli
from scripts.chat_cli import Chat, converse
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STOP_HERE = object()  # in a script: Ctrl-C


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


class ScriptedEngine:
    """Gives scripted replies, and records the prompts and settings."""

    def __init__(self, tokenizer, *replies, context=200):
        self.tokenizer, self.replies = tokenizer, iter(replies)
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=context))
        self.prompts, self.settings = [], []

    def stream(self, tokens, **settings):
        self.prompts.append(self.tokenizer.decode(tokens))
        self.settings.append(settings)
        for piece in next(self.replies):
            if piece is STOP_HERE:
                raise KeyboardInterrupt
            if isinstance(piece, int):
                ids = [piece]
            elif piece in self.tokenizer.get_special_tokens():
                ids = [self.tokenizer.encode_special(piece)]
            else:
                ids = self.tokenizer.encode(piece)
            yield from (([id], [1]) for id in ids)


def reply_of(*pieces):
    return [*pieces, "<|assistant_end|>", "never shown"]


CALL = ("<|python_start|>", "12*7", "<|python_end|>", "<|output_start|>", "84", "<|output_end|>")


def shown(tokenizer, capsys, *pieces):
    Chat(ScriptedEngine(tokenizer, pieces), max_tokens=50, sampling=GREEDY).answer("hello")
    return capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that simulates a terminal with typed lines; KeyboardInterrupt is Ctrl-C."""

    def use_terminal(*lines):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)

    return use_terminal


def pipe(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


# ---------------------------------------------------------------------------------------------------------
# What it shows


def test_characters_come_whole(tokenizer, capsys, monkeypatch):
    """Decoding token by token broke emoji and CJK."""
    written = []
    monkeypatch.setattr("builtins.print", lambda text, **_: written.append(text))
    Chat(ScriptedEngine(tokenizer, reply_of("\u732b \U0001f63a!")), max_tokens=50, sampling=GREEDY).answer(
        "hello"
    )
    assert "".join(written) == "\u732b \U0001f63a!"
    assert [text for text in written if text] == [
        "\u732b",
        " ",
        "\U0001f63a",
        "!",
    ]  # each as soon as it is complete


def test_an_incomplete_character(tokenizer, capsys):
    start = tokenizer.encode("\U0001f63a")[:-1]
    assert shown(tokenizer, capsys, *reply_of("a", *start)) == "a\ufffd\n"
    assert shown(tokenizer, capsys, *reply_of("a", *start, *CALL)) == "a\ufffd[12*7 = 84]\n"


def test_nothing_is_shown_after_the_end(tokenizer, capsys):
    assert shown(tokenizer, capsys, *reply_of("yes")) == "yes\n"
    assert shown(tokenizer, capsys, "yes", "<|bos|>", "a document") == "yes\n"
    assert shown(tokenizer, capsys, "yes", "<|user_start|>", "what I would reply_of") == "yes\n"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("It is ", *CALL, " then."), "It is [12*7 = 84] then.\n"),
        (CALL, "[12*7 = 84]\n"),
        ((*CALL, *CALL), "[12*7 = 84][12*7 = 84]\n"),
        ((*CALL[:3], " or so"), "[12*7] or so\n"),  # the calculator had no result
        ((*CALL[:3], *CALL), "[12*7][12*7 = 84]\n"),
        (CALL[:2], "[12*7]\n"),
        (("<|python_start|>", "<|python_end|>", "none"), "none\n"),
        (CALL[3:], "[84]\n"),  # a result without a call, written by the model
    ],
)
def test_calculator(tokenizer, capsys, pieces, expected):
    assert shown(tokenizer, capsys, *reply_of(*pieces)) == expected


def test_calculator_is_dim_on_a_terminal(tokenizer, capsys, terminal):
    terminal()
    assert shown(tokenizer, capsys, *reply_of("so ", *CALL, ".")) == "so \033[2m[12*7 = 84]\033[0m.\n"
    assert shown(tokenizer, capsys, *CALL[:2]) == "\033[2m[12*7]\033[0m\n"  # never left dim


def test_no_text_controls_the_terminal(tokenizer, capsys):
    """Escape sequences, also split over tokens or in the 8-bit form of ESC [."""
    evil = "a\x1b[31mb\x1b]0;title\x07c\rd\x08e\x9b2Jf\x7fg\x00h"
    assert shown(tokenizer, capsys, *reply_of(evil)) == "a[31mb]0;titlecde2Jfgh\n"
    assert shown(tokenizer, capsys, *reply_of("<|python_start|>", "1\x1b[0m")) == "[1[0m]\n"
    assert shown(tokenizer, capsys, *reply_of("x\ty\n\u00e9t\u00e9\u200d")) == "x\ty\n\u00e9t\u00e9\u200d\n"


# ---------------------------------------------------------------------------------------------------------
# The history


def test_history(tokenizer, capsys):
    """The next prompt has the exact tokens of the reply, including calls and results."""
    engine = ScriptedEngine(tokenizer, reply_of("It is ", *CALL, "."), reply_of("yes"))
    sampling = SamplingParams(temperature=0.5, top_k=7, seed=3)
    chat = Chat(engine, max_tokens=100, sampling=sampling)
    chat.answer("12 times 7?")
    chat.answer("really?")
    first = "<|bos|><|user_start|>12 times 7?<|user_end|><|assistant_start|>"
    reply = f"It is {''.join(CALL)}.<|assistant_end|>"
    second = "<|user_start|>really?<|user_end|><|assistant_start|>"
    assert engine.prompts == [first, first + reply + second]
    assert engine.settings == [{"max_tokens": 100, "sampling": sampling}] * 2


def test_an_empty_reply_does_not_break_the_next_turn(tokenizer, capsys):
    """The renderer refuses messages without content."""
    engine = ScriptedEngine(tokenizer, reply_of(), [STOP_HERE], reply_of("yes"))
    chat = Chat(engine, max_tokens=50, sampling=GREEDY)
    chat.answer("one")
    with pytest.raises(KeyboardInterrupt):
        chat.answer("two")
    chat.answer("three")
    assert capsys.readouterr().out == "\n\nyes\n"
    assert engine.prompts[-1].endswith("<|user_start|>three<|user_end|><|assistant_start|>")
    assert engine.prompts[-1].count("<|assistant_start|><|assistant_end|>") == 2


def test_old_turns_are_dropped(tokenizer, capsys):
    engine = ScriptedEngine(tokenizer, *itertools.repeat(reply_of("the river"), 30), context=64)
    chat = Chat(engine, max_tokens=1000, sampling=GREEDY)
    assert (chat.max_tokens, chat.room) == (32, 32)
    for turn in range(30):
        chat.answer(f"turn {turn} ")
    lengths = [len(tokenizer.enc.encode(prompt, allowed_special="all")) for prompt in engine.prompts]
    assert max(lengths) <= 32
    assert "turn 29 " in engine.prompts[-1]
    assert "turn 28 " in engine.prompts[-1]
    assert "turn 0 " not in engine.prompts[-1]


# ---------------------------------------------------------------------------------------------------------
# The conversation


@pytest.mark.parametrize("command", ["/clear", "/new", " /clear "])
def test_forget(tokenizer, capsys, terminal, command):
    engine = ScriptedEngine(tokenizer, reply_of("yes"), reply_of("no"))
    terminal("one", command, "", "two")
    converse(Chat(engine, max_tokens=50, sampling=GREEDY), "hello")
    assert engine.prompts[1] == "<|bos|><|user_start|>two<|user_end|><|assistant_start|>"


@pytest.mark.parametrize("leave", ["/quit", "exit", "quit", EOFError, KeyboardInterrupt])
def test_leave(tokenizer, capsys, terminal, leave):
    engine = ScriptedEngine(tokenizer, reply_of("yes"))
    terminal("one", leave, "two")
    converse(Chat(engine, max_tokens=50, sampling=GREEDY), "hello")
    assert len(engine.prompts) == 1
    assert capsys.readouterr().out.startswith("hello\nyes\n")


def test_ctrl_c_stops_the_answer_and_keeps_its_text(tokenizer, capsys, terminal):
    engine = ScriptedEngine(tokenizer, ["the river", STOP_HERE, " and more"], reply_of("yes"))
    terminal("one", "two")
    converse(Chat(engine, max_tokens=50, sampling=GREEDY), "hello")
    assert capsys.readouterr().out == "hello\nthe river\nyes\n\n"
    assert "<|assistant_start|>the river<|assistant_end|><|user_start|>two" in engine.prompts[1]


def test_a_second_ctrl_c_keeps_the_text(tokenizer, capsys, terminal, monkeypatch):
    """While the line end was printed, it lost the reply, and the next turn was an error."""
    engine = ScriptedEngine(tokenizer, ["the river", STOP_HERE], reply_of("yes"))
    terminal("one", "two")
    ends_of_lines = []

    def print_until_interrupted(*text, end="\n", **_):
        ends_of_lines.append(end)
        if end and ends_of_lines.count(end) == 2:  # the first one is that of the greeting
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", print_until_interrupted)
    converse(Chat(engine, max_tokens=50, sampling=GREEDY), "hello")
    assert "<|assistant_start|>the river<|assistant_end|><|user_start|>two" in engine.prompts[1]


def test_ctrl_c_ends_a_run_over_a_pipe(tokenizer, capsys, monkeypatch):
    pipe(monkeypatch, b"one\ntwo\n")
    with pytest.raises(KeyboardInterrupt):
        converse(Chat(ScriptedEngine(tokenizer, [STOP_HERE]), max_tokens=50, sampling=GREEDY), "hello")


def test_a_pipe_gets_only_the_answers(tokenizer, capsys, monkeypatch):
    """Each line is a turn; invalid UTF-8 does not end the input, and the last line needs no newline."""
    pipe(monkeypatch, "one \u732b\n\n".encode() + b"t\xffwo\nquit please")
    engine = ScriptedEngine(tokenizer, reply_of("yes"), reply_of("no"), reply_of("well"))
    converse(Chat(engine, max_tokens=50, sampling=GREEDY), "hello")
    assert capsys.readouterr().out == "yes\nno\nwell\n"
    for prompt, text in zip(engine.prompts, ("one \u732b", "t\ufffdwo", "quit please"), strict=True):
        assert prompt.endswith(f"<|user_start|>{text}<|user_end|><|assistant_start|>")


# ---------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def checkpoint(tokenizer, base_dir):
    """Save SFT and mid models; those of SFT have zero convolutions, of which loading warns."""
    tokenizer.save(base_dir / "tokenizer")
    config = small_config(vocab_size=tokenizer.get_vocab_size(), sequence_len=64)
    for seed, (stage, step) in enumerate((("sft", 3), ("sft", 7), ("mid", 5))):
        model = random_model(config, seed)
        if stage == "sft":
            for name, parameter in model.named_parameters():
                parameter.data *= "conv1d" not in name
        save_checkpoint(checkpoint_dir(stage, "d4"), step, model, None, {})


def greedy(text, source="sft", step=None, max_tokens=20):
    """Return the greedy reply of the model, from the engine; it must be plain text."""
    model, tokenizer, _ = load_model(source, torch.device("cpu"), "eval", step=step)
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]}, 44)
    (row,) = Engine(model, tokenizer).complete([prompt], max_tokens=max_tokens, sampling=GREEDY)
    text = tokenizer.decode(row.tokens)
    assert text
    assert "<|" not in text
    return text.translate(chat_cli.CONTROLS)


def test_prompt(checkpoint, capsys):
    flags = ["-t", "0", "-m", "20", "--device-type=cpu"]
    assert chat_cli.main([*flags, "-p", "the river"]) == 0
    assert capsys.readouterr() == (greedy("the river") + "\n", "")
    assert chat_cli.main([*flags, "-p", "the river", "-i", "mid", "-g", "d4"]) == 0
    assert capsys.readouterr().out == greedy("the river", "mid") + "\n"
    assert chat_cli.main([*flags, "-p", "the river", "-s", "3"]) == 0
    assert capsys.readouterr().out == greedy("the river", step=3) + "\n"


@pytest.mark.parametrize("flags", [[], ["--decoder=plain"]])
def test_decoder(checkpoint, capsys, monkeypatch, flags):
    kinds = []
    monkeypatch.setattr(engine, "decoder_for", lambda *args: kinds.append(args[3]) or decoder_for(*args))
    chat_cli.main(["-t", "0", "-m", "3", "--device-type=cpu", "-p", "the river", *flags])
    assert kinds == ["plain" if flags else "best"]


def test_answers_differ_unless_seeded(checkpoint, capsys):
    """The engine's seed was always 42: answers were the same at any temperature."""

    def answers(*flags):
        for _ in range(2):
            chat_cli.main(["-p", "the river", "-t", "2", "-k", "0", "-m", "20", "--device-type=cpu", *flags])
            yield capsys.readouterr().out

    assert len(set(answers())) == 2
    assert len(set(answers("--seed=1"))) == 1


def test_half_of_the_context_is_for_the_prompt(checkpoint, capsys, monkeypatch):
    pipe(monkeypatch, b"the river\nthe bridge\n")
    assert chat_cli.main(["--device-type=cpu", "-t", "0"]) == 0
    assert capsys.readouterr().err == "replies have at most 32 tokens, half of the context, not 512\n"


def test_only_the_answer_is_on_stdout(checkpoint, base_dir):
    """Warnings of loading go to stderr, in the command as users start it."""
    command = [sys.executable, "-m", "scripts.chat_cli", "-p", "the river", "-t", "0", "-m", "20"]
    done = subprocess.run([*command, "--device-type=cpu"], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode() == greedy("the river") + "\n"
    assert b"every convolution weight is zero" in done.stderr


def test_no_checkpoint(capsys, base_dir):
    with pytest.raises(SystemExit) as end:
        run(lambda: chat_cli.main(["--device-type=cpu"]))
    assert str(end.value).startswith(f"error: no model dN in {base_dir}")  # Python prints it, with status 1
    assert "\n" not in str(end.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-m", "0"], "max_tokens=0"),
        (["-p", " "], "the prompt is empty"),
        (["-t", "-1"], "temperature=-1"),
        (["-k", "-1"], "top_k=-1"),
        (["-i", "big"], "'big' is not one of base, mid, sft, rl"),
        (["-g", "d9"], "no checkpoint in .*d9"),
        (["-s", "4"], "no checkpoint of step 4"),
    ],
)
def test_invalid_settings(flags, message, checkpoint):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        chat_cli.main(["--device-type=cpu", *flags])
