"""An exported model in transformers and lm-eval: the same numbers as ours, and the usual features."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from nanochat.cache import window_channels
from nanochat.checkpoint_manager import load_model
from nanochat.hub.export import import_checkpoint
from tests.helpers.models import SECOND, random_model, small_config

pytestmark = pytest.mark.slow

PLANS = [
    {},
    {"n_layer": 1},
    {"n_layer": 7, "n_kernel": 4, "slc_rate": 2},
    {"n_layer": 5, "n_head": 6, "n_kv_head": 2, "n_embd": 36},
    {"n_kernel": 1, "n_head": 3, "n_kv_head": 3, "n_embd": 30},
    {"n_kernel": 6, "slc_rate": 1},
    {"slc_rate": 0},
    {"residual_conv": 2, "n_kernel": 4},
    {"value_embeds": True, "x0_mix": True},
    {**SECOND, "residual_conv": 1, "slc_rate": 0},
    {**SECOND, "n_layer": 5, "n_head": 6, "n_kv_head": 2, "n_embd": 36, "residual_conv": 4},
]
DEEP = {"n_layer": 7, "n_kernel": 4, "slc_rate": 2}
DEEP_SECOND = {**SECOND, **DEEP, "residual_conv": 5, "n_kv_head": 1}
every_plan = pytest.mark.parametrize("plan", PLANS, ids=str)
both_generations = pytest.mark.parametrize("plan", [DEEP, DEEP_SECOND], ids=["published", "second"])
TOLERANCE = {"rtol": 0, "atol": 1e-4}
pytest_plugins = "tests.helpers.exported"


def both(exported, plan):
    """Return a model of ours with another plan, and the exported class with the same weights."""
    ours = random_model(small_config(**plan))
    config = type(exported.theirs.config)(**asdict(ours.config))
    theirs = type(exported.theirs)(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def random_ids(*shape, seed=0):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows, filler=7, left=True):
    """Pad rows of different lengths to (ids, attention_mask)."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), filler), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask


def greedy(model, ids, tokens=12, **settings):
    """Generate greedily and return the new tokens (B, tokens)."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(ids, max_new_tokens=tokens, **settings)[:, ids.size(1) :]


# ---------------------------------------------------------------------------------------------------------
# The model


@every_plan
def test_same_logits(exported, plan):
    ours, theirs = both(exported, plan)
    for shape in ((1, 1), (3, 2), (2, 17), (1, 40)):
        ids = random_ids(*shape)
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-5)


@every_plan
def test_same_greedy_tokens_with_and_without_cache(exported, plan):
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
    """Neither its ids nor its length: not through attention, convolution or positions."""
    ours, theirs = both(exported, plan)
    rows = [random_ids(n, seed=n) for n in (1, 2, 7, 19)]
    for filler in (7, 31):
        ids, mask = padded(rows, filler, left)
        logits = theirs(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        for row, row_logits, row_mask in zip(rows, logits, mask.bool(), strict=True):
            torch.testing.assert_close(row_logits[row_mask], ours(row[None])[0], **TOLERANCE)


def test_every_token_attends_to_one_at_least(exported):
    """Some attention kernels return NaN for a row without keys, and 0 * NaN spreads it from the padding."""
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
def test_left_padded_generation_equals_unpadded(exported, plan):
    _, theirs = both(exported, plan)
    rows = [random_ids(n, seed=n) for n in (1, 2, 7, 19)]
    ids, mask = padded(rows)
    alone = torch.cat([greedy(theirs, row[None]) for row in rows])
    for use_cache in (True, False):
        assert torch.equal(greedy(theirs, ids, attention_mask=mask, use_cache=use_cache), alone)


@pytest.mark.parametrize("plan", [{}, DEEP, SECOND, DEEP_SECOND], ids=str)
def test_beam_search_reorders_the_whole_cache(exported, plan):
    _, theirs = both(exported, plan)
    ids, mask = padded([random_ids(n, seed=n) for n in (3, 8)])
    beams = [
        greedy(theirs, ids, attention_mask=mask, num_beams=4, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*beams)
    assert not torch.equal(beams[0], greedy(theirs, ids, attention_mask=mask))


@both_generations
def test_cache_rows_are_repeated_and_selected(exported, plan):
    ours, theirs = both(exported, plan)
    ids, more = random_ids(2, 6), random_ids(3, 2, seed=1)
    cache = theirs(ids).cache
    layers = [window_channels(ours.config, kind) for kind in ours.config.layer_kinds]
    assert {key: tuple(window.shape) for key, window in cache.windows.items()} == {
        (i, name): (2, K - 1, C) for i, convs in enumerate(layers) for name, (K, C) in convs.items()
    }
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    expected = theirs(torch.cat([ids[[0, 1, 0]], more], dim=1)).logits[:, 6:]
    torch.testing.assert_close(theirs(more, cache=cache).logits, expected, **TOLERANCE)
    cache.reset()
    torch.testing.assert_close(theirs(more, cache=cache).logits, theirs(more).logits, **TOLERANCE)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_generation_continues_from_a_cache(either):
    theirs, ids = either.theirs, random_ids(2, 4)
    first = theirs.generate(
        ids, max_new_tokens=5, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0
    )
    assert first.cache.get_seq_length() == 8  # the last token has not been read
    longer = torch.cat([first.sequences, random_ids(2, 3, seed=1)], dim=1)
    assert torch.equal(greedy(theirs, longer, cache=first.cache), greedy(theirs, longer))


def test_generation_stops_at_the_same_tokens(either):
    """<|assistant_end|> and <|bos|> end generation; GPT.generate does not return them."""
    bos, end = (either.tokenizer.encode_special(token) for token in ("<|bos|>", "<|assistant_end|>"))
    settings = either.theirs.generation_config
    assert settings.eos_token_id == [end, bos]
    assert settings.pad_token_id == either.their_tokenizer.pad_token_id == bos
    assert (either.their_tokenizer.bos_token_id, either.their_tokenizer.eos_token_id) == (bos, end)
    ours, theirs = copy.deepcopy((either.model, either.theirs))
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


def test_labels_give_our_loss(either):
    ids = random_ids(3, 15)
    labels = ids.clone()
    labels[0, :6] = labels[2, 9:] = -100
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == -100, -1)
    out = either.theirs(ids, labels=labels)
    torch.testing.assert_close(out.loss, either.model(ids[:, :-1], targets))
    summed = either.theirs(ids, labels=labels, num_items_in_batch=10).loss  # as Trainer calls it
    torch.testing.assert_close(summed, either.model(ids[:, :-1], targets, loss_reduction="sum") / 10)


def sum_of_gradients(ours, rows):
    """Return our gradients of the mean loss of all tokens, one row at a time and without padding."""
    count = sum(len(row) - 1 for row in rows)
    for row in rows:
        (ours(row[None, :-1], row[None, 1:], loss_reduction="sum") / count).backward()
    return {name: parameter.grad for name, parameter in ours.named_parameters()}


@both_generations
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_rows_give_our_gradients(exported, plan, left):
    ours, theirs = both(exported, plan)
    rows = [random_ids(n, seed=n) for n in (2, 4, 11)]
    for filler in (7, 31):
        ids, mask = padded(rows, filler, left)
        unlabelled = (mask == 0) | (mask.cumsum(1) == 1)  # padding on the left is before the first token
        theirs.zero_grad()
        theirs.train()(ids, attention_mask=mask, labels=ids.masked_fill(unlabelled, -100)).loss.backward()
        ours.zero_grad()
        expected = sum_of_gradients(ours, rows)
        assert all(gradient.any() for gradient in expected.values())
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@both_generations
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not"])
def test_every_parameter_has_the_same_gradient_with_checkpointing(exported, plan, use_reentrant):
    """Reentrant checkpointing, the default of older versions, loses the gradients of named arguments."""
    _, theirs = both(exported, plan)
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
    theirs.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert theirs.transformer.h[0].gradient_checkpointing
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-7)


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


def test_embeddings_alone_are_refused_where_values_are_looked_up_by_token(exported):
    ids = random_ids(2, 9)
    _, theirs = both(exported, {**SECOND, "value_embeds": False})
    embeds = theirs.get_input_embeddings()(ids)
    assert torch.equal(theirs(inputs_embeds=embeds).logits, theirs(ids).logits)
    _, theirs = both(exported, SECOND)
    message = r"inputs_embeds of shape \(2, 9, 24\).*value_embeds=True.*pass input_ids"
    with pytest.raises(ValueError, match=message):
        theirs(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=message):
        theirs.generate(inputs_embeds=embeds, max_new_tokens=2)
    bare = theirs.transformer
    with pytest.raises(ValueError, match=message):
        bare(inputs_embeds=embeds)


@pytest.mark.parametrize("plan", [{}, SECOND], ids=["published", "second"])
@pytest.mark.parametrize("size", [61, 44])
def test_a_resized_vocabulary_keeps_the_other_tokens(exported, plan, size):
    """The tables of values kept their size, and a new token was outside of them."""
    ours, theirs = both(exported, plan)
    ids = random_ids(2, 9) % 44
    assert theirs.resize_token_embeddings(size, mean_resizing=False) is theirs.get_input_embeddings()
    torch.testing.assert_close(theirs(ids).logits[..., :44], ours(ids)[..., :44], **TOLERANCE)
    theirs(torch.full((1, 2), size - 1)).logits.sum().backward()
    assert all(p.grad.size(0) == size for name, p in theirs.named_parameters() if "embed" in name)
    assert type(theirs)(theirs.config).load_state_dict(theirs.state_dict())


def test_save_and_load_bit_for_bit(either, tmp_path):
    either.theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    state = loaded.state_dict()
    assert state.keys() == either.model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in either.model.state_dict().items())
    ids = random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, either.theirs(ids).logits)
    either.their_tokenizer.save_pretrained(tmp_path)
    assert import_checkpoint(tmp_path) == ("sft", "d5", 700)
    model, tokenizer, _ = load_model("sft", torch.device("cpu"), "eval")
    assert torch.equal(model(ids), either.model(ids))
    assert tokenizer.fields() == either.tokenizer.fields()


@pytest.mark.parametrize("settings", [{"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}], ids=str)
def test_bfloat16(either, settings):
    theirs = AutoModelForCausalLM.from_pretrained(either.folder, trust_remote_code=True, **settings)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    ids, mask = padded([random_ids(n, seed=n) for n in (5, 9)])
    logits = theirs(ids, attention_mask=mask).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[1], either.model(ids[1:])[0], rtol=0, atol=0.15)
    assert torch.equal(greedy(theirs, ids[:1, 4:]), greedy(theirs, ids[:1, 4:], use_cache=False))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_map(exported, device_map):
    theirs = AutoModelForCausalLM.from_pretrained(
        exported.folder, trust_remote_code=True, device_map=device_map, attn_implementation="sdpa"
    )
    ids = random_ids(2, 9)
    assert torch.equal(theirs(ids).logits, exported.theirs(ids).logits)


def test_every_parameter_is_initialized(exported):
    """A convolution without initialization would keep uninitialized memory."""
    config = AutoConfig.from_pretrained(exported.folder, trust_remote_code=True)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (40, 5, 32)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in fresh.named_parameters():
        assert 0.01 < parameter.std() < 0.04, name


def test_new_parts_start_without_effect_on_the_stream(exported, exported_second, tmp_path):
    """Those of weights that a file lacks, too: a published model can be finetuned as a second generation."""
    config = AutoConfig.from_pretrained(exported_second.folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    exported.theirs.save_pretrained(tmp_path)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, trust_remote_code=True)
    n_new = 0
    for model in (fresh, grown):
        for name, parameter in model.named_parameters():
            if name.endswith(("_conv.weight", "mlp.conv.weight", "x0_scales")):
                assert not parameter.any(), name
            elif name.endswith("resid_scales"):
                assert (parameter == 1).all()
            elif model is fresh or "value_" in name:
                assert 0.01 < parameter.std() < 0.04, name
            else:
                assert torch.equal(parameter, exported.model.get_parameter(name)), name
                continue
            n_new += 1
    assert n_new == len(list(fresh.parameters())) + 2 + 5 + 2 * 2 + 3
    loaded = AutoModelForCausalLM.from_pretrained(exported_second.folder, trust_remote_code=True)
    assert all(torch.equal(p, exported_second.model.get_parameter(n)) for n, p in loaded.named_parameters())


def test_invalid_arguments_are_refused(exported):
    theirs, ids = exported.theirs, random_ids(2, 5)
    cache = theirs(ids).cache
    with pytest.raises(ValueError, match=r"shape \(2, 1\), expected \(2, 6\): one value for each token"):
        theirs(ids[:, :1], attention_mask=torch.ones(2, 1), cache=cache)
    with pytest.raises(ValueError, match="the cache is a DynamicCache"):
        theirs(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        theirs(ids, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        theirs(ids, inputs_embeds=torch.zeros(2, 5, 40))
    with pytest.raises(ValueError, match=r"Flash ?Attention"):
        AutoModelForCausalLM.from_pretrained(
            exported.folder, trust_remote_code=True, attn_implementation="flash_attention_2"
        )


# ---------------------------------------------------------------------------------------------------------
# lm-eval, and a process without this package

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


def test_lm_eval_computes_our_likelihoods(exported, tmp_path):
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

    n_correct = 0
    samples = sorted(results["samples"]["river"], key=lambda sample: sample["doc_id"])
    for question, sample in zip(QUESTIONS, samples, strict=True):
        ours = [likelihood(question["question"], choice) for choice in question["choices"]]
        assert [float(theirs) for theirs, _ in sample["filtered_resps"]] == pytest.approx(ours, abs=1e-3)
        n_correct += ours.index(max(ours)) == question["answer"]
    assert results["results"]["river"]["acc,none"] == pytest.approx(n_correct / len(QUESTIONS))


GENERATE_WITHOUT_NANOCHAT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nanochat", "scripts", "tasks", "rustbpe", "tiktoken"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Missing())
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


def test_without_the_nanochat_package(exported, tmp_path):
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", GENERATE_WITHOUT_NANOCHAT, exported.folder],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    prompt = exported.tokenizer.render_for_completion(
        {"messages": [{"role": "user", "content": "the river"}]}
    )
    expected = exported.theirs.generate(torch.tensor([prompt]), max_new_tokens=8)
    assert json.loads(process.stdout) == expected[0].tolist()
