"""Chat evaluation: batched answers equal single ones, and the figures are right."""

import random
from dataclasses import dataclass
from functools import partial
from itertools import count

import pytest
import torch

from nanochat import engine
from nanochat.chat_eval import chatcore, evaluate_task, letter_id, pass_at_k
from nanochat.chat_format import render_for_completion
from nanochat.common import Runtime
from nanochat.decode.running import decoder_for
from nanochat.sampling import SamplingParams
from scripts import chat_eval
from tasks import mixtures
from tasks.common import Task
from tests.helpers.chats import write_base_checkpoint
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import VOCAB_SIZE, WORDS, train_tokenizer

SEQ_LEN = 128


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def attentive_model(**plan):
    """Return a model whose logits depend on more than the last token, which is the same in all prompts."""
    model = random_model(small_config(vocab_size=VOCAB_SIZE, sequence_len=SEQ_LEN, **plan))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight *= 5
    return model


@pytest.fixture(scope="module")
def model():
    return attentive_model()


class Choices(Task):
    """Multiple choice of 2 to 5 letters with prompts of many lengths; records the answers that it judges."""

    eval_type = "categorical"

    def __init__(self, n=23, alphabet="ABCDE"):
        super().__init__()
        self.n, self.alphabet, self.chosen = n, alphabet, {}

    def num_examples(self):
        return self.n

    def get_example(self, index):
        rng = random.Random(index)
        letters = list(self.alphabet[: rng.randint(2, 5)])
        messages = [
            {"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 12])))},
            {"role": "assistant", "content": rng.choice(letters)},
        ]
        return {"messages": messages, "letters": letters, "index": index}

    def evaluate(self, conversation, completion):
        self.chosen[conversation["index"]] = completion
        return super().evaluate(conversation, completion)


class Echo(Task):
    """A generative task whose judge accepts the greedy answer of the model to the prompt alone."""

    def __init__(self, model, tokenizer, n=9):
        super().__init__()
        self.model, self.tokenizer, self.n, self.replies = model, tokenizer, n, {}

    def num_examples(self):
        return self.n

    def get_example(self, index):
        text = " ".join(random.Random(index).choices(WORDS, k=1 + 3 * index))
        return {"index": index, "messages": [{"role": "user", "content": text}]}

    def evaluate(self, conversation, completion):
        self.replies[conversation["index"]] = completion
        prompt = render_for_completion(self.tokenizer, conversation, SEQ_LEN - 10)
        tokens = list(self.model.generate(torch.tensor([prompt]), 10, temperature=0))
        return conversation["index"] % 3 != 0 and completion == self.tokenizer.decode(tokens)


def evaluate(task, model, tokenizer, batch_size=8, runtime=None, **settings):
    settings = {"max_new_tokens": 10, **settings}
    return evaluate_task(task, model, tokenizer, runtime or Runtime.cpu(), batch_size=batch_size, **settings)


def without_time(result):
    assert result["seconds"] > 0
    return {key: value for key, value in result.items() if key != "seconds"}


@torch.no_grad()
def by_full_forward(model, tokenizer, conversation):
    prompt = render_for_completion(tokenizer, conversation, SEQ_LEN)
    logits = model(torch.tensor([prompt]))[0, -1]
    return max(conversation["letters"], key=lambda letter: logits[letter_id(tokenizer, letter)])


@pytest.mark.parametrize("plan", [{}, {"slc_rate": 0}, {"slc_rate": 2, "n_kernel": 5}])
def test_letters_of_a_batch_equal_those_of_full_forwards(plan, tokenizer):
    model = attentive_model(**plan)
    expected = {
        c["index"]: by_full_forward(model, tokenizer, c) for c in map(Choices().get_example, range(23))
    }
    assert len(set(expected.values())) > 2
    for batch_size in (1, 4, 64):
        task = Choices()
        evaluate(task, model, tokenizer, batch_size)
        assert task.chosen == expected


def test_letters_are_compared_in_float32(tokenizer):
    """On CUDA their logits were rounded to bfloat16, and the first of equal ones was taken."""
    model = attentive_model()
    model.compute_dtype = torch.bfloat16
    a, b = (letter_id(tokenizer, letter) for letter in "AB")
    larger, smaller = Choices(alphabet="AB"), Choices(alphabet="AB")
    for task, factor in ((larger, 1 + 2**-12), (smaller, 1 - 2**-12)):
        with torch.no_grad():
            model.lm_head.weight[b] = model.lm_head.weight[a] * factor
        evaluate(task, model, tokenizer)
    assert all({larger.chosen[i], smaller.chosen[i]} == {"A", "B"} for i in range(23))


def test_figures_of_a_categorical_task(model, tokenizer):
    task = Choices()
    result = evaluate(task, model, tokenizer)
    n_right = sum(task.chosen[c["index"]] == c["messages"][-1]["content"] for c in task)
    assert 0 < n_right < 23
    accuracy = n_right / 23
    assert without_time(result) == {
        "accuracy": pytest.approx(accuracy),
        "strict": pytest.approx(accuracy),
        "standard_error": pytest.approx((accuracy * (1 - accuracy) / 23) ** 0.5),
        "n": 23,
        "chance": pytest.approx(sum(1 / len(c["letters"]) for c in task) / 23),
    }


def test_generative_task(model, tokenizer):
    task = Echo(model, tokenizer)
    result = evaluate(task, model, tokenizer, batch_size=4)
    assert len(set(task.replies.values())) > 4
    assert without_time(result) == {
        "accuracy": pytest.approx(6 / 9),
        "strict": pytest.approx(6 / 9),
        "standard_error": pytest.approx((6 / 9 * 3 / 9 / 9) ** 0.5),
        "n": 9,
        "chance": 0,
    }
    alone = Echo(model, tokenizer)
    assert without_time(evaluate(alone, model, tokenizer, batch_size=1)) == without_time(result)
    assert alone.replies == task.replies


def test_pass_at_k_by_hand():
    assert [pass_at_k(4, c, 1) for c in range(5)] == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4, 1])
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)  # 3 of the 6 pairs have no right one
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert [pass_at_k(3, c, 3) for c in range(4)] == [0, 1, 1, 1]


class Graded(Task):
    """Three problems; of the samples of problem i, the first i + 1 to be judged are right.

    The strict judge takes all samples of the last problem.
    """

    def __init__(self):
        super().__init__()
        self.replies = {i: [] for i in range(3)}
        self.places = [count() for _ in range(3)]  # several threads judge

    def num_examples(self):
        return 3

    def get_example(self, index):
        return {"index": index, "messages": [{"role": "user", "content": WORDS[index]}]}

    def evaluate(self, conversation, completion):
        index = conversation["index"]
        self.replies[index].append(completion)
        return next(self.places[index]) <= index

    def evaluate_strict(self, conversation, completion):
        return conversation["index"] == 2


def test_several_samples_of_a_problem(model, tokenizer):
    settings = {"sampling": SamplingParams(temperature=1.0, seed=1), "num_samples": 5}
    task, again = Graded(), Graded()
    result = evaluate(task, model, tokenizer, **settings)
    assert all(len(replies) == 5 and len(set(replies)) > 1 for replies in task.replies.values())
    squares = (1 / 25 + 4 / 25 + 9 / 25) / 3
    assert without_time(result) == {
        "accuracy": pytest.approx(6 / 15),
        "strict": pytest.approx(5 / 15),
        "standard_error": pytest.approx(((squares - 0.16) / 3) ** 0.5, rel=1e-3),
        "n": 3,
        "chance": 0,
        "pass@2": pytest.approx((4 / 10 + 7 / 10 + 9 / 10) / 3),
        "pass@4": pytest.approx((4 / 5 + 1 + 1) / 3),
        "pass@5": 1,
    }
    evaluate(again, model, tokenizer, batch_size=5, **settings)
    assert {i: sorted(replies) for i, replies in again.replies.items()} == {
        i: sorted(replies) for i, replies in task.replies.items()
    }
    assert "pass@2" not in evaluate(Choices(), model, tokenizer, **settings)


def test_a_script_of_nanochat_evaluates_a_task(model, tokenizer, monkeypatch):
    """Its accuracy of several samples is the share of problems with one that is right."""
    monkeypatch.setattr(mixtures, "eval_tasks", lambda data: {"Graded": Graded, "Choices": Choices})
    lent = engine.Engine(model, tokenizer)
    run = partial(chat_eval.run_chat_eval, model=model, tokenizer=tokenizer, engine=lent, max_new_tokens=4)
    assert run("Choices", batch_size=8) == pytest.approx(evaluate(Choices(), model, tokenizer)["accuracy"])
    assert run("Graded", num_samples=4, temperature=1.0) == 1
    assert run("Graded", max_problems=2) == 0, "the figure is not the strict one"
    with pytest.raises(ValueError, match="unknown task Bee; there are Graded, Choices"):
        run("Bee")


def test_the_command_samples(model, tokenizer, base_dir, monkeypatch, capsys):
    monkeypatch.setattr(mixtures, "eval_tasks", lambda data: {"Graded": Graded})
    write_base_checkpoint(base_dir)
    usual = ["--device-type=cpu", "-i", "base", "-m", "3"]
    assert chat_eval.main([*usual, "-t", "1", "-n", "2", "-k", "5"]) == 0
    assert (
        "Graded: 83.3 +- 13.6 %, strict 33.3 % of 3 (chance 0 %), pass@2 100.0 %, " in capsys.readouterr().out
    )
    for flags, message in (
        (["-n", "2"], "num_samples=2 greedy replies would all be the same: give --temperature"),
        (["-n", "2", "-t", "1", "-b", "1"], "batch_size=1 must hold the num_samples=2"),
        (["-t", "-1"], "temperature=-1.0 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            chat_eval.main([*usual, *flags])


@pytest.mark.parametrize("flags", [[], ["--decoder=plain"]])
def test_decoder(model, tokenizer, base_dir, monkeypatch, flags):
    """The flag of the command reaches the replies to a generative task."""
    kinds = []
    monkeypatch.setattr(engine, "decoder_for", lambda *args: kinds.append(args[3]) or decoder_for(*args))
    monkeypatch.setattr(mixtures, "eval_tasks", lambda data: {"Echo": lambda: Echo(model, tokenizer, n=1)})
    write_base_checkpoint(base_dir)
    chat_eval.main(["--device-type=cpu", "-i", "base", "-m", "3", *flags])
    assert kinds == ["plain" if flags else "best"]


def test_prompts_leave_room_for_the_reply(model, tokenizer):
    """A prompt longer than the context minus the reply loses its start."""
    task = Echo(model, tokenizer, n=1)
    long = {"index": 1, "messages": [{"role": "user", "content": " ".join(WORDS * 9)}]}
    task.get_example = lambda index: long
    assert evaluate(task, model, tokenizer)["accuracy"] == 1


def test_max_problems(model, tokenizer):
    choices, echo = Choices(), Echo(model, tokenizer)
    result = evaluate(choices, model, tokenizer, max_problems=4)
    assert result["n"] == evaluate(echo, model, tokenizer, max_problems=4)["n"] == 4
    assert sorted(choices.chosen) == sorted(echo.replies) == [0, 1, 2, 3]
    assert result["chance"] == pytest.approx(sum(1 / len(choices[i]["letters"]) for i in range(4)) / 4)
    assert evaluate(Choices(), model, tokenizer, max_problems=100)["n"] == 23


@dataclass(frozen=True, kw_only=True)
class OneOfRanks(Runtime):
    """A rank that records what it would send to the others."""

    sent: list

    def sum_(self, tensor):
        self.sent.append(tensor.clone())
        return tensor


@pytest.mark.parametrize("make", [lambda m, t: Choices(n=5), lambda m, t: Echo(m, t, n=5)])
@pytest.mark.parametrize("world_size", [2, 7])
def test_ranks_share_the_conversations(make, world_size, model, tokenizer):
    """With seven ranks for five conversations, two have none and still take part in the sum."""
    whole = evaluate(make(model, tokenizer), model, tokenizer)
    sent = []
    for rank in range(world_size):
        cpu = {"device": torch.device("cpu"), "compute_dtype": torch.float32, "sent": sent}
        runtime = OneOfRanks(rank=rank, world_size=world_size, **cpu)
        assert evaluate(make(model, tokenizer), model, tokenizer, runtime=runtime)["n"] == 5
    assert len(sent) == world_size
    n_right, n_strict, guesses, _ = sum(sent).tolist()
    figures = [whole[key] for key in ("accuracy", "strict", "chance")]
    assert [n_right / 5, n_strict / 5, guesses / 5] == pytest.approx(figures)


def test_a_letter_must_be_one_token(model, tokenizer):
    assert tokenizer.decode([letter_id(tokenizer, "A")]) == "A"
    with pytest.raises(ValueError, match="the letter '\u03a9' is 2 tokens"):
        letter_id(tokenizer, "\u03a9")
    with pytest.raises(ValueError, match="is 2 tokens; a choice must be named by one"):
        evaluate(Choices(alphabet="A\u03a9\u03a8\u03a6\u0394"), model, tokenizer)


def test_nothing_to_evaluate(model, tokenizer):
    with pytest.raises(ValueError, match="Choices has no conversations"):
        evaluate(Choices(n=0), model, tokenizer)
    with pytest.raises(ValueError, match="Pick has no conversations"):
        evaluate(Choices(), model, tokenizer, max_problems=0, name="Pick")


def test_chatcore_by_hand():
    tasks = {
        "choice": {"accuracy": 0.9, "strict": 0.625, "chance": 0.25},
        "bee": {"accuracy": 1.0, "strict": 0.9, "chance": 0.0},
        "worse than guessing": {"accuracy": 0.2, "strict": 0.2, "chance": 0.5},
    }
    assert chatcore(tasks) == pytest.approx((0.5 + 0.9 - 0.6) / 3)
    assert chatcore(tasks, without=["bee", "not there"]) == pytest.approx((0.5 - 0.6) / 2)
    assert chatcore(tasks, without=list(tasks)) is None
    assert chatcore({}) is None
