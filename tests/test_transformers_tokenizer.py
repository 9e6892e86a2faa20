"""The exported tokenizer and chat template in transformers: the same ids and masks as RustBPETokenizer."""

import pytest
from transformers import AutoTokenizer

from tests.helpers.texts import MULTILINGUAL, SPECIAL_LOOKING
from tests.helpers.vocabulary import VOCAB_SIZE

pytest_plugins = "tests.helpers.exported"


def test_same_ids(exported):
    ours, theirs = exported.tokenizer, exported.their_tokenizer
    for text in [*MULTILINGUAL, *SPECIAL_LOOKING]:
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode(text), repr(text)
        assert theirs.decode(ids) == text
    assert len(theirs) == VOCAB_SIZE
    assert theirs("<|bos|>The river")["input_ids"] == ours.encode("The river", prepend="<|bos|>")
    batch = theirs(["a", "the river"], padding=True)
    assert [row[0] for row in batch["attention_mask"]] == [0, 1]


def test_add_bos_token(exported):
    theirs = AutoTokenizer.from_pretrained(exported.folder, trust_remote_code=True, add_bos_token=True)
    assert theirs("The river")["input_ids"] == exported.tokenizer.encode("The river", prepend="<|bos|>")


CONVERSATIONS = [
    [("user", "hi"), ("assistant", "Hello, what of the river?")],
    [
        ("system", "Be brief.\n"),
        ("user", " 12*12?\n\n"),
        ("assistant", "\n144 "),
        ("user", "Ok"),
        ("assistant", "!"),
    ],
    [
        ("user", "<|assistant_end|><|bos|> <| <<|user_end|>>"),
        ("assistant", "<|python_start|>1+1<|python_end|>"),
    ],
    [("system", "<|bos|>"), ("user", "\u65e5\u672c\u8a9e \U0001f680"), ("assistant", "{{ x }} {% y %} &lt;")],
    [
        ("user", "What is 12*12?"),
        (
            "assistant",
            [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "12*12"},
                {"type": "python_output", "text": "144"},
                {"type": "text", "text": "144.<|output_end|>"},
            ],
        ),
    ],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_chat_template_matches_render_conversation(exported, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    ours, theirs = exported.tokenizer, exported.their_tokenizer
    expected_ids, expected_mask = ours.render_conversation({"messages": messages})
    rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == expected_ids
    assert rendered["assistant_masks"] == expected_mask
    prompt = ours.render_for_completion({"messages": messages})
    for conversation in (messages, messages[:-1]):  # a final reply is dropped, as in render_for_completion
        rendered = theirs.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
        assert rendered["input_ids"] == prompt


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "system", "content": "x"}], "needs at least one user message"),
        ([{"role": "assistant", "content": "x"}], "must alternate"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "must alternate"),
        ([{"role": "user", "content": ""}], "must not be empty"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "must be a string"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image"}]}],
            "text, python or python_output",
        ),
    ],
)
def test_malformed_conversations(exported, messages, reason):
    with pytest.raises(Exception, match=reason):
        exported.their_tokenizer.apply_chat_template(messages)
    with pytest.raises((ValueError, AttributeError)):
        exported.tokenizer.render_conversation({"messages": messages})
