"""A CORE bundle of a few rows, one task of each kind and one whose rows are missing."""

import csv
import json
import random

from tests.helpers.vocabulary import WORDS

CORE_YAML = r"""icl_tasks:
-
  label: pick
  dataset_uri: reading/pick.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\nAnswer: "
-
  label: who
  dataset_uri: language/who.jsonl
  num_fewshot: [0]
  icl_task_type: schema
-
  label: lost
  dataset_uri: reading/lost.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
-
  label: recall
  dataset_uri: world/recall.jsonl
  num_fewshot: [3]
  icl_task_type: language_modeling
  has_categories: true
"""
BASELINES = {"pick": 25, "who": 50, "lost": 0, "recall": 0, "unused": 33.3}
PLAIN_WORDS = [word for word in WORDS if word.strip() == word]


def bundle_rows():
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choices(PLAIN_WORDS, k=n))

    pick = [
        {
            "query": f"Question: {words(rng.randrange(1, 8))}?\n",
            # the answers of every other row are one token, and share a row of the batch
            "choices": list("ABCD") if i % 2 else [words(rng.randrange(1, 5)) for _ in range(4)],
            "gold": rng.randrange(4),
        }
        for i in range(9)
    ]
    who = [
        {
            "context_options": [f"{words(5)} river", f"{words(5)} bridge"],
            "continuation": words(rng.randrange(1, 6)) + ".",
            "gold": rng.randrange(2),
        }
        for _ in range(7)
    ]
    recall = [
        {"context": f"{words(6)} is", "continuation": words(1), "category": "ab"[i % 5 == 0]}
        for i in range(8)
    ]
    return {"reading/pick": pick, "language/who": who, "world/recall": recall}


def write_bundle(folder):
    for name, rows in bundle_rows().items():
        path = folder / "eval_data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text(CORE_YAML)
    with open(folder / "eval_meta_data.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Eval Task", "Task Category", "Random baseline", "Description"])
        writer.writerows(
            [label, "some", value, 'two\nlines, and "more"'] for label, value in BASELINES.items()
        )
    return folder
