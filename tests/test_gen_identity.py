"""Identity conversations: varied, repeatable, true to the persona, and fit to learn from."""

import json

import pytest
import yaml

from dev import gen_identity
from nanochat.common import base_dir
from tasks import mixtures as recipes
from tasks.customjson import CustomJSON
from tests.helpers.vocabulary import train_tokenizer

PERSONA = {
    "name": "Iberis",
    "maker": "the people of the Garden",
    "style": "friendly",
    "facts": {"your size": "I have {four} layers.", "the garden": "It is in \u672d\u5e4c."},
}


def write_persona(tmp_path, persona=PERSONA, name="persona.yaml"):
    path = tmp_path / name
    text = json.dumps(persona) if name.endswith(".json") else yaml.safe_dump(persona, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return path


def generate(tmp_path, *flags, persona=PERSONA, name="persona.yaml"):
    out = tmp_path / "out.jsonl"
    path = write_persona(tmp_path, persona, name)
    assert gen_identity.main([str(path), f"--out={out}", "--overwrite", *flags]) == 0
    return out.read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_file(tmp_path):
    first = generate(tmp_path, "--num=50")
    assert generate(tmp_path, "--num=50", name="persona.json") == first
    assert generate(tmp_path, "--num=50", "--seed=1") != first


def test_varied_and_true_to_the_persona(tmp_path):
    generate(tmp_path, "--num=400")
    chats = [chat["messages"] for chat in CustomJSON(tmp_path / "out.jsonl")]
    asked = [tuple(m["content"] for m in chat if m["role"] == "user") for chat in chats]
    assert len(set(asked)) == 400
    assert {len(questions) for questions in asked} == {1, 2, 3, 4}
    assert 0.25 < sum(len(questions) > 1 for questions in asked) / 400 < 0.42
    answers = {m["content"] for chat in chats for m in chat if m["role"] == "assistant"}
    assert len(answers) > 40
    for answer in answers:
        assert any(
            part in answer for part in ("Iberis", "eople of the Garden", "language model", "{four}", "It is")
        )
    assert {"I have {four} layers.", "It is in \u672d\u5e4c."} < answers
    tokenizer = train_tokenizer()
    for chat in chats[:50]:
        tokenizer.render_conversation({"messages": chat})


def test_who_is_called_as_another_model_does_not_deny_it(tmp_path):
    text = generate(tmp_path, "--num=300", persona={"name": "Claude", "maker": "me"})
    assert "not Claude" not in text
    assert "Are you Claude" not in text


def test_by_default_they_go_where_the_recipes_look(tmp_path):
    path = write_persona(tmp_path)
    gen_identity.main([str(path), "--num=7"])
    assert [len(task) for task in recipes._identity()] == [7]
    with pytest.raises(
        ValueError, match="already exists: choose another --out, or replace it with --overwrite"
    ):
        gen_identity.main([str(path)])
    assert len((base_dir() / "identity_conversations.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("persona", "message"),
    [
        ({"name": "Iberis"}, r"persona\.yaml is not a persona: .*'maker'"),
        ({"name": "Iberis", "maker": "me", "age": 3}, r"persona\.yaml is not a persona: .*'age'"),
        ({"name": "", "maker": "me"}, "name: '' must be text, and not empty"),
        ({"name": "Iberis", "maker": "me", "facts": {"your size": 4}}, "your size: 4 must be text"),
        (
            {"name": "Iberis", "maker": "me", "facts": ["a fact"]},
            r"facts=\['a fact'\] must map topics to answers",
        ),
        ({"name": "Iberis", "maker": "me", "style": "rude"}, "'rude' must be one of plain, friendly, formal"),
        (["Iberis"], "needs the keys name and maker"),
    ],
)
def test_bad_personas(tmp_path, persona, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, persona=persona)


def test_more_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(gen_identity, "SUBJECTS", {"name": (("Who?", "You?"), ("{name}.",))})
    monkeypatch.setattr(gen_identity, "MULTI_TURN_SHARE", 0)
    with pytest.raises(ValueError, match=r"num=500: the phrases make only about .* different conversations"):
        generate(tmp_path, "--num=500")
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(ValueError, match=r"broken\.yaml is not a persona"):
        gen_identity.main([str(path)])
