"""An exported model in transformers and lm-eval: the same numbers as ours, and what users expect there."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from nanochat.checkpoint_manager import checkpoint_dir, load_model, save_checkpoint
from nanochat.common import base_dir
from nanochat.hub.export import import_checkpoint
from scripts import export_hf
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer
from tests.test_hf_tokenizer import MULTILINGUAL, SPECIAL_LOOKING

PLANS = [
    {},
    {"n_layer": 1},
    {"n_layer": 7, "n_kernel": 4, "slc_rate": 2},
    {"n_layer": 5, "n_head": 6, "n_kv_head": 2, "n_embd": 36},
    {"n_kernel": 1, "n_head": 3, "n_kv_head": 3, "n_embd": 30},
    {"n_kernel": 6, "slc_rate": 1},
    {"slc_rate": 0},
]
every_plan = pytest.mark.parametrize("plan", PLANS, ids=str)
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Our model and tokenizer, the folder that they were exported to, and what transformers makes of it."""
    folder = tmp_path_factory.mktemp("exported") / "saint_iberis"
    tokenizer = train_tokenizer()
    model = random_model(small_config(vocab_size=VOCAB_SIZE, n_layer=5, n_head=4, n_kv_head=2, n_embd=40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder.parent / "base"))
        tokenizer.save(base_dir() / "tokenizer")
        save_checkpoint(checkpoint_dir("sft", "d5"), 700, model, None, {})
        assert export_hf.main(["-i", "sft", "-g", "d5", "-s", "700", "-o", str(folder)]) == 0
    return SimpleNamespace(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        theirs=AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        their_tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
    )


def both(exported, plan):
    """Our model of another shape, and theirs with the same weights."""
    ours = random_model(small_config(**plan))
    config = type(exported.theirs.config)(**asdict(ours.config))
    theirs = type(exported.theirs)(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def random_ids(*shape, seed=0):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows, filler=7, left=True):
    """Rows of different lengths as (ids, attention_mask)."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), filler), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def greedy(model, ids, tokens=12, **settings):
    """The new tokens (B, tokens)."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(ids, max_new_tokens=tokens, **settings)[:, ids.size(1) :]


# ---------------------------------------------------------------------------------------------------------
# The model


@every_plan
def test_same_logits(exported, plan):
    ours, theirs = both(exported, plan)
    for shape in ((1, 1), (3, 2), (2, 17), (1, 40)):
        ids = random_ids(*shape)
        torch.testing.assert_close(theirs(ids).logits, ours(ids), **TOLERANCE)


@every_plan
def test_greedy_generation_is_ours_with_and_without_cache(exported, plan):
    ours, theirs = both(exported, plan)
    for length in (1, 2, 3, 9):
        ids = expected = random_ids(2, length, seed=length)
        for _ in range(12):
            expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], dim=1)
        for use_cache in (True, False):
            assert torch.equal(greedy(theirs, ids, use_cache=use_cache), expected[:, length:])


@every_plan
def test_any_chunking_gives_the_same_logits(exported, plan):
    ours, theirs = both(exported, plan)
    ids = random_ids(3, 16)
    expected = ours(ids)
    for sizes in ([5, 1, 10], [1, 1, 1, 13], [15, 1], [2, 6, 8]):
        cache, parts = None, []
        for chunk in ids.split(sizes, dim=1):
            out = theirs(chunk, cache=cache)
            cache = out.cache
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, **TOLERANCE)


@every_plan
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(exported, plan, left):
    """Neither what is in it nor how much there is: not through attention, convolution or positions."""
    ours, theirs = both(exported, plan)
    rows = [random_ids(n, seed=n) for n in (1, 2, 7, 19)]
    for filler in (7, 31):
        ids, mask = padded(rows, filler, left)
        logits = theirs(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        for row, row_logits, row_mask in zip(rows, logits, mask.bool(), strict=True):
            torch.testing.assert_close(row_logits[row_mask], ours(row[None])[0], **TOLERANCE)


def test_softmax_is_never_over_nothing(exported):
    """Which is NaN in some attention kernels, and goes from padding into all else as 0 * NaN."""
    visible_tokens = sys.modules[type(exported.theirs).__module__].visible_tokens
    mask = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    expected = [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    ]
    for T in range(1, 5):
        visible = visible_tokens(mask, T, 4, mask.device)
        assert torch.equal(visible[:, 0], torch.tensor(expected)[:, 4 - T :].bool())


@every_plan
def test_left_padded_generation_is_that_of_each_row_alone(exported, plan):
    _, theirs = both(exported, plan)
    rows = [random_ids(n, seed=n) for n in (1, 2, 7, 19)]
    ids, mask = padded(rows)
    alone = torch.cat([greedy(theirs, row[None]) for row in rows])
    for use_cache in (True, False):
        assert torch.equal(greedy(theirs, ids, attention_mask=mask, use_cache=use_cache), alone)


def test_beam_search_reorders_the_whole_cache(exported):
    for plan in ({}, {"n_layer": 7, "n_kernel": 4, "slc_rate": 2}):
        _, theirs = both(exported, plan)
        ids, mask = padded([random_ids(n, seed=n) for n in (3, 8)])
        beams = [
            greedy(theirs, ids, attention_mask=mask, num_beams=4, use_cache=cached)
            for cached in (True, False)
        ]
        assert torch.equal(*beams)
        assert not torch.equal(beams[0], greedy(theirs, ids, attention_mask=mask))


def test_rows_of_a_cache_are_repeated_and_chosen(exported):
    theirs = exported.theirs
    ids, more = random_ids(2, 6), random_ids(3, 2, seed=1)
    cache = theirs(ids).cache
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    expected = theirs(torch.cat([ids[[0, 1, 0]], more], dim=1)).logits[:, 6:]
    torch.testing.assert_close(theirs(more, cache=cache).logits, expected, **TOLERANCE)
    cache.reset()
    torch.testing.assert_close(theirs(more, cache=cache).logits, theirs(more).logits, **TOLERANCE)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_a_conversation_goes_on_from_its_cache(exported):
    theirs, ids = exported.theirs, random_ids(2, 4)
    first = theirs.generate(
        ids, max_new_tokens=5, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0
    )
    assert first.cache.get_seq_length() == 8  # the last token has not been read
    longer = torch.cat([first.sequences, random_ids(2, 3, seed=1)], dim=1)
    assert torch.equal(greedy(theirs, longer, cache=first.cache), greedy(theirs, longer))


def test_generation_ends_where_ours_does(exported):
    """At <|assistant_end|> and at <|bos|>, which ours leaves out; finished rows are filled with padding."""
    bos, end = (exported.tokenizer.encode_special(token) for token in ("<|bos|>", "<|assistant_end|>"))
    settings = exported.theirs.generation_config
    assert settings.eos_token_id == [end, bos]
    assert settings.pad_token_id == exported.their_tokenizer.pad_token_id == bos
    assert (exported.their_tokenizer.bos_token_id, exported.their_tokenizer.eos_token_id) == (bos, end)
    ours, theirs = copy.deepcopy((exported.model, exported.theirs))
    for model in (ours, theirs):
        model.lm_head.weight.data[[bos, end]] *= 4  # likely
    ends = set()
    for seed in range(20):
        ids = random_ids(1, 3, seed=seed)
        expected = list(ours.generate(ids, 30, temperature=0))
        new = theirs.generate(ids, max_new_tokens=30)[0, 3:].tolist()
        assert new[: len(expected)] == expected
        ends.update(new[len(expected) :])
    assert ends == {bos, end}


def test_labels_give_our_loss(exported):
    ids = random_ids(3, 15)
    labels = ids.clone()
    labels[0, :6] = labels[2, 9:] = -100
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == -100, -1)
    out = exported.theirs(ids, labels=labels)
    torch.testing.assert_close(out.loss, exported.model(ids[:, :-1], targets))
    summed = exported.theirs(ids, labels=labels, num_items_in_batch=10).loss  # as Trainer asks for it
    torch.testing.assert_close(summed, exported.model(ids[:, :-1], targets, loss_reduction="sum") / 10)


def test_every_parameter_learns_with_and_without_checkpointing(exported):
    _, theirs = both(exported, PLANS[2])
    theirs.train()
    ids, mask = padded([random_ids(n, seed=n) for n in (4, 9)])

    def gradients():
        theirs.zero_grad()
        out = theirs(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        assert out.cache is None
        out.loss.backward()
        return {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()}

    plain = gradients()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in plain.values())
    theirs.gradient_checkpointing_enable()
    assert theirs.transformer.h[0].gradient_checkpointing
    again = gradients()
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_hidden_states_and_last_logits(exported):
    ids = random_ids(2, 9)
    out = exported.theirs(ids, output_hidden_states=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 9, 40)] * 6
    assert exported.theirs(ids).hidden_states is None
    bare = AutoModel.from_pretrained(exported.folder, trust_remote_code=True)
    assert torch.equal(bare(ids).last_hidden_state, out.hidden_states[-1])
    embedded = exported.theirs(inputs_embeds=exported.theirs.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, out.logits)
    assert torch.equal(exported.theirs(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(exported.theirs(ids, return_dict=False)[0], out.logits)


def test_save_and_load_again_bit_for_bit(exported, tmp_path):
    exported.theirs.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    state = again.state_dict()
    assert state.keys() == exported.model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in exported.model.state_dict().items())
    ids = random_ids(2, 9)
    assert torch.equal(again(ids).logits, exported.theirs(ids).logits)
    exported.their_tokenizer.save_pretrained(tmp_path)
    assert import_checkpoint(tmp_path) == ("sft", "d5", 700)
    model, tokenizer, _ = load_model("sft", torch.device("cpu"), "eval")
    assert torch.equal(model(ids), exported.model(ids))
    assert tokenizer.fields() == exported.tokenizer.fields()


@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}], ids=str)
def test_bfloat16(exported, settings):
    theirs = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True, **settings)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    ids, mask = padded([random_ids(n, seed=n) for n in (5, 9)])
    logits = theirs(ids, attention_mask=mask).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[1], exported.model(ids[1:])[0], rtol=0, atol=0.15)
    assert torch.equal(greedy(theirs, ids[:1, 4:]), greedy(theirs, ids[:1, 4:], use_cache=False))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_map(exported, device_map):
    theirs = AutoModelForCausalLM.from_pretrained(
        exported.folder, trust_remote_code=True, device_map=device_map, attn_implementation="sdpa"
    )
    ids = random_ids(2, 9)
    assert torch.equal(theirs(ids).logits, exported.theirs(ids).logits)


def test_fresh_weights_are_drawn_for_every_parameter(exported):
    """A convolution that nobody initialises stays what the memory held."""
    config = AutoConfig.from_pretrained(exported.folder, trust_remote_code=True)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (40, 5, 32)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in fresh.named_parameters():
        assert 0.01 < parameter.std() < 0.04, name


def test_what_does_not_fit_is_told(exported):
    theirs, ids = exported.theirs, random_ids(2, 5)
    cache = theirs(ids).cache
    with pytest.raises(ValueError, match=r"shape \(2, 1\), expected \(2, 6\): one value for each token"):
        theirs(ids[:, :1], attention_mask=torch.ones(2, 1), cache=cache)
    with pytest.raises(ValueError, match="the cache is a DynamicCache"):
        theirs(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="output_attentions is not available"):
        theirs(ids, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        theirs(ids, inputs_embeds=torch.zeros(2, 5, 40))
    with pytest.raises(ValueError, match=r"Flash ?Attention"):
        AutoModelForCausalLM.from_pretrained(
            exported.folder, trust_remote_code=True, attn_implementation="flash_attention_2"
        )


# ---------------------------------------------------------------------------------------------------------
# The tokenizer


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


def test_a_start_token_for_those_who_ask(exported):
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
def test_chat_template_renders_what_we_render(exported, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    ours, theirs = exported.tokenizer, exported.their_tokenizer
    expected_ids, expected_mask = ours.render_conversation({"messages": messages})
    rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == expected_ids
    assert rendered["assistant_masks"] == expected_mask
    prompt = ours.render_for_completion({"messages": messages})
    for asked in (messages, messages[:-1]):  # a reply to the last message is left out, as ours does
        rendered = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        assert rendered["input_ids"] == prompt


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "system", "content": "x"}], "none of the messages is the user's"),
        ([{"role": "assistant", "content": "x"}], "take turns"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "take turns"),
        ([{"role": "user", "content": ""}], "is empty"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "no text where text is due"),
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


# ---------------------------------------------------------------------------------------------------------
# Elsewhere

QUESTIONS = [
    {"question": "The river is", "choices": [" under the bridge", " water"], "answer": 1},
    {"question": "def", "choices": [" return", " x**2 == 3.14", "\n"], "answer": 0},
    {"question": "they've the light of 1887", "choices": [", isn't", " stone,"], "answer": 1},
]
TASK = """
task: river
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_lm_eval_finds_our_likelihoods(exported, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "river.yaml").write_text(TASK.format(path=questions))
    results = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported.folder), "trust_remote_code": True, "add_bos_token": True},
        tasks=["river"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )

    def likelihood(question, choice):
        context, whole = (
            exported.tokenizer.encode(text, prepend="<|bos|>") for text in (question, question + choice)
        )
        logs = exported.model(torch.tensor([whole]))[0].log_softmax(-1)
        return sum(logs[i - 1, whole[i]].item() for i in range(len(context), len(whole)))

    right = 0
    samples = sorted(results["samples"]["river"], key=lambda sample: sample["doc_id"])
    for question, sample in zip(QUESTIONS, samples, strict=True):
        ours = [likelihood(question["question"], choice) for choice in question["choices"]]
        assert [float(theirs) for theirs, _ in sample["filtered_resps"]] == pytest.approx(ours, abs=1e-3)
        right += ours.index(max(ours)) == question["answer"]
    assert results["results"]["river"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


WITHOUT_US = """
import sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nanochat", "scripts", "tasks", "rustbpe", "tiktoken"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, NotHere())
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": "the river"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(model.generate(**inputs, max_new_tokens=8)[0].tolist())
"""


def test_in_a_process_without_this_package(exported, tmp_path):
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US, exported.folder],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    prompt = exported.tokenizer.render_for_completion(
        {"messages": [{"role": "user", "content": "the river"}]}
    )
    expected = exported.theirs.generate(torch.tensor([prompt]), max_new_tokens=8)
    assert json.loads(done.stdout) == expected[0].tolist()
