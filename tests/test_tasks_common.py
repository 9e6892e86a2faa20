"""Slices, sequences and mixtures of tasks."""

import pytest

from tasks.common import Task, TaskMixture, TaskSequence, item_random, render_mc


class Numbers(Task):
    """Conversations whose id is a name and a number."""

    def __init__(self, name, size, **bounds):
        super().__init__(**bounds)
        self.name, self.size = name, size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return {"id": f"{self.name}{index}"}


class Graded(Numbers):
    """A completion is correct if it starts with the name."""

    def evaluate(self, conversation, completion):
        return completion.startswith(self.name)

    def evaluate_strict(self, conversation, completion):
        return completion == self.name


def ids(task):
    return [conversation["id"] for conversation in task]


def test_slices_equal_slices_of_lists():
    assert ids(Numbers("a", 5)) == ["a0", "a1", "a2", "a3", "a4"]
    for start in (0, 1, 4, 7):
        for stop in (None, 7, 9):
            for step in (1, 2, 3):
                task = Numbers("a", 8, start=start, stop=stop, step=step)
                expected = [f"a{i}" for i in range(8)][start:stop:step]
                assert len(task) == len(expected)
                assert ids(task) == expected
    assert ids(Numbers("a", 8, start=3, stop=3)) == []
    assert ids(Numbers("a", 8, start=9)) == []


@pytest.mark.parametrize("bounds", [{"start": -1}, {"step": 0}, {"step": -1}, {"start": 3, "stop": 2}])
def test_invalid_slices(bounds):
    with pytest.raises(ValueError, match="must satisfy 0 <= start <= stop and step >= 1"):
        Numbers("a", 5, **bounds)


@pytest.mark.parametrize("index", [-1, 2])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"index {index} is out of range for a task of 2"):
        Numbers("a", 5, start=1, step=2)[index]


def test_a_sequence_keeps_its_order_and_repeats():
    a, empty, b = Numbers("a", 5, start=1, step=3), Numbers("x", 0), Numbers("b", 2)
    sequence = TaskSequence([a, empty, b, a])
    assert len(sequence) == 6
    assert ids(sequence) == ["a1", "a4", "b0", "b1", "a1", "a4"]
    assert ids(TaskSequence([empty])) == ids(TaskSequence([])) == []


def test_a_mixture_is_a_fixed_permutation():
    tasks = [Numbers("a", 100), Numbers("b", 50, stop=30), Numbers("a", 100)]
    mixed = ids(TaskMixture(tasks))
    # a run that is resumed, on another machine or with another version, continues in this order
    assert mixed[:8] == ["a87", "a73", "a77", "a0", "a3", "b1", "a51", "a67"]
    assert mixed == ids(TaskMixture(tasks))
    assert sorted(mixed) == sorted(ids(TaskSequence(tasks)))
    assert mixed != ids(TaskSequence(tasks))
    assert mixed != ids(TaskMixture(tasks, seed=43))
    assert "b" in "".join(mixed[:40]), "the tasks are not mixed"
    mixture = TaskMixture(tasks)
    assert [mixture[i]["id"] for i in reversed(range(230))] == mixed[::-1], "the order of access matters"


def test_each_task_of_a_mixture_grades_its_own_conversations():
    """Also in a sequence in a mixture, and with its own reward."""

    class Half(Graded):
        def reward(self, conversation, completion):
            return self.evaluate(conversation, completion) / 2

    mixture = TaskMixture([TaskSequence([Graded("a", 5), Half("b", 5)]), Graded("c", 5)])
    for index, conversation in enumerate(mixture):
        name, part = conversation["id"][0], mixture.part(index)
        assert part.evaluate(conversation, f"{name}!")
        assert not part.evaluate(conversation, "d")
        assert part.evaluate_strict(conversation, name)
        assert not part.evaluate_strict(conversation, f"{name}!")
        assert part.reward(conversation, f"{name}!") == (0.5 if name == "b" else 1)
    assert [type(part).__name__ for part in mixture.parts()] == ["Graded", "Half", "Graded"]


def test_items_of_train_and_test_share_no_generator():
    """Regression: Random(-n) is Random(n), so test item i was train item i + 1."""
    drawn = {split: [item_random(split, i).random() for i in range(3000)] for split in ("train", "test")}
    assert len({*drawn["train"], *drawn["test"]}) == 6000
    assert drawn["test"][7] == item_random("test", 7).random()
    with pytest.raises(ValueError, match="'val' must be 'train' or 'test'"):
        item_random("val", 0)


def test_render_mc():
    assert render_mc("Which is a bird?", "ABC", ["a cat", "an owl", "a cod"]) == (
        "Multiple Choice question: Which is a bird?\n- a cat=A\n- an owl=B\n- a cod=C\n\n"
        "Respond only with the letter of the correct answer."
    )
    with pytest.raises(ValueError, match="zip"):
        render_mc("?", "ABCD", ["one", "two"])


def test_a_training_task_cannot_be_evaluated():
    with pytest.raises(NotImplementedError, match="Numbers cannot be evaluated"):
        Numbers("a", 1).evaluate({"messages": []}, "a")
