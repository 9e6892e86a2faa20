import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from nanochat.attention import apply_rotary, rotary_tables
from nanochat.cache import HybridCache, state_bytes
from nanochat.gpt import GPT, GPTConfig
from nanochat.ops import head_logits, head_loss
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.sampling import SamplingParams, penalize_repetition, sample
from tests.helpers.models import random_model, small_config


def meta_model(config):
    with torch.device("meta"):
        return GPT(config)


# ---------------------------------------------------------------------------------------------------------
# Shape


def test_d20_is_the_published_model():
    config = GPTConfig.from_depth(20, vocab_size=65536)
    assert config == GPTConfig(2048, 65536, 20, 10, 10, 1280, 3, 3)
    assert [i for i, kind in enumerate(config.layer_kinds) if kind == "attention"] == [
        1,
        4,
        7,
        10,
        13,
        16,
        19,
    ]

    shapes = {key: tuple(value.shape) for key, value in meta_model(config).state_dict().items()}
    expected = {"transformer.wte.weight": (65536, 1280), "lm_head.weight": (65536, 1280)}
    for i, kind in enumerate(config.layer_kinds):
        layer = f"transformer.h.{i}"
        expected[f"{layer}.mlp.c_fc.weight"] = (5120, 1280)
        expected[f"{layer}.mlp.c_proj.weight"] = (1280, 5120)
        if kind == "attention":
            for name in ("c_q", "c_k", "c_v", "c_proj"):
                expected[f"{layer}.attn.{name}.weight"] = (1280, 1280)
        else:
            for name in ("x_proj", "B_proj", "c_proj"):
                expected[f"{layer}.attn.{name}.weight"] = (1280, 1280)
            expected[f"{layer}.attn.alpha_proj.weight"] = (10, 1280)
            expected[f"{layer}.attn.A_proj.weight"] = (128, 1280)
            expected[f"{layer}.attn.conv1d.weight"] = (1280, 1, 3)
    assert shapes == expected
    assert len(shapes) == 148
    assert meta_model(config).num_parameters()["total"] == 542_035_200


def test_accounting_counts_attention_only_where_there_is_attention():
    """The published estimate counted 20 attention layers where 7 are, 13.8 % too many FLOPs."""
    model = meta_model(GPTConfig.from_depth(20, vocab_size=65536))
    matrices_and_taps = 542_035_200 - 65536 * 1280
    assert model.flops_per_token() == 6 * matrices_and_taps + 7 * 12 * 1280 * 2048 == 2_969_095_680
    assert model.num_parameters() == {
        "wte": 83_886_080,
        "lm_head": 83_886_080,
        "attention": 45_875_200,
        "slc2": 66_243_840,
        "mlp": 262_144_000,
        "total": 542_035_200,
    }
    assert state_bytes(model.config) == {"per_token": 35_840, "per_sequence": 66_560}


@pytest.mark.parametrize("slc_rate", [0, 1, 2, 3, 4])
def test_flops_of_the_matrices_are_what_torch_counts(slc_rate):
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config(slc_rate=slc_rate)
    model = random_model(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 8, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    matrices = (
        sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.transformer.wte.weight.numel()
    )
    assert counted[torch.ops.aten.mm] == 2 * matrices * 8
    attention = 12 * config.n_embd * config.sequence_len * config.layer_kinds.count("attention")
    taps = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    assert model.get_device() == model.device
    assert model.flops_per_token() == model.estimate_flops() == 6 * (matrices + taps) + attention


@pytest.mark.parametrize("depth", range(1, 33))
def test_depth_gives_whole_heads_of_128(depth):
    """Odd depths crashed: 64 * depth is no multiple of the head size."""
    config = GPTConfig.from_depth(depth)
    assert config.head_dim == 128
    assert config.n_embd == 64 * depth + (64 if depth % 2 else 0)
    assert config.layer_kinds[-1] == "attention"


def test_layer_plans():
    def plan(**changes):
        return "".join(kind[0] for kind in small_config(n_layer=6, **changes).layer_kinds)

    assert plan(slc_rate=0) == "aaaaaa"
    assert plan(slc_rate=1) == "sssssa"
    assert plan(slc_rate=2) == "sasasa"
    assert plan(slc_rate=3) == "sassaa"


def test_config_survives_json_and_old_ones_lack_the_last_two_keys():
    config = small_config(n_kernel=4, slc_rate=2)
    assert GPTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    published = {
        k: v for k, v in dataclasses.asdict(small_config()).items() if k not in ("n_kernel", "slc_rate")
    }
    assert GPTConfig(**published) == small_config(n_kernel=3, slc_rate=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_embd=24 must be an even multiple of n_head=5"),
        ({"n_head": 24, "n_kv_head": 1}, "even multiple"),
        ({"n_head": 4, "n_kv_head": 3}, "multiple of n_kv_head=3"),
        ({"n_kernel": 0}, "n_kernel=0 must be at least 1"),
        ({"slc_rate": -1}, "slc_rate=-1"),
        ({"residual_conv": -1}, "residual_conv=-1"),
        ({"score_scale": 0.0}, "score_scale=0.0"),
        ({"value_embeds": True, "n_embd": 8}, "n_embd=8 to be at least 12"),
    ],
)
def test_config_says_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


# ---------------------------------------------------------------------------------------------------------
# Values to train from


@pytest.mark.parametrize("slc_rate", [0, 3])
def test_init_weights_leaves_nothing_to_what_the_memory_held(slc_rate):
    """The published code built on meta, called to_empty() and never initialised its convolution."""
    model = meta_model(small_config(slc_rate=slc_rate)).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        starts_at_zero = name == "lm_head.weight" or name.endswith("c_proj.weight")
        assert parameter.any().item() != starts_at_zero, name
    taps = [p for p in model.parameters() if p.ndim == 3]
    assert all(p.abs().max() <= 3**-0.5 and p.std() > 0.2 for p in taps)


@pytest.mark.parametrize("slc_rate", [0, 2, 3])
def test_every_parameter_has_a_gradient_and_moves(slc_rate):
    """With conv and c_proj both zero no gradient reached SLC2: its branches stayed dead for a whole run."""
    torch.manual_seed(0)
    model = GPT(small_config(slc_rate=slc_rate))
    model.init_weights()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig())
    assert sorted(p.data_ptr() for group in optimizer.param_groups for p in group["params"]) == sorted(
        p.data_ptr() for p in model.parameters()
    )
    idx = torch.randint(0, 50, (4, 17))
    for _ in range(3):
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:]).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    for name, p in model.named_parameters():
        assert gradients[name].isfinite().all(), name
        assert gradients[name].any(), f"{name} has no gradient after two steps"
        assert not torch.equal(p, start[name]), f"{name} did not move"


def test_rotary():
    cos, sin = rotary_tables(8, 6, torch.device("cpu"))
    assert cos.dtype == torch.bfloat16
    x = torch.randn(1, 8, 2, 6)
    y = apply_rotary(x, cos.float(), sin.float())
    angle = torch.tensor(5 * 10000 ** (-2 / 6))  # position 5, second pair
    c, s = angle.cos().bfloat16().float(), angle.sin().bfloat16().float()
    x1, x2 = x[0, 5, 1, 1], x[0, 5, 1, 4]
    torch.testing.assert_close(y[0, 5, 1, 1], x1 * c + x2 * s)
    torch.testing.assert_close(y[0, 5, 1, 4], -x1 * s + x2 * c)


def test_tables_made_while_evaluating_serve_training():
    rotary_tables.cache_clear()
    model, idx = random_model(small_config()), torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode():
        model(idx)
    model(idx, idx).backward()


# ---------------------------------------------------------------------------------------------------------
# Loss


def test_loss_reductions_against_float64():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64) * 9
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 1] = targets[1, 4] = -1
    logits = 15 * torch.tanh(x @ weight.T / 15)
    nats = -logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    nats = torch.where(targets >= 0, nats, 0.0)
    torch.testing.assert_close(head_loss(x, weight, targets, "none"), nats.flatten())
    torch.testing.assert_close(head_loss(x, weight, targets, "sum"), nats.sum())
    torch.testing.assert_close(head_loss(x, weight, targets, "mean"), nats.sum() / 8)


def test_batch_without_targets_gives_zero_and_not_nan():
    """The mean over no targets was 0/0, and one such micro-batch poisoned all weights."""
    model, idx = random_model(small_config()), torch.zeros(2, 4, dtype=torch.long)
    loss = model(idx, torch.full_like(idx, -1))
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters())


def test_logits_are_float32_and_capped_in_float32():
    """tanh in bfloat16 gives only a few dozen values near the cap."""
    x, weight = torch.randn(64, 16).bfloat16() * 4, torch.randn(32, 16)
    logits = head_logits(x, weight)
    assert logits.dtype == torch.float32
    raw = F.linear(x, weight.bfloat16()).float()
    torch.testing.assert_close(logits, 15 * torch.tanh(raw / 15))
    assert random_model(small_config())(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float32


def test_compute_dtype_bfloat16_is_near_float32():
    config, idx = small_config(), torch.randint(0, 50, (2, 16))
    model = random_model(config)
    reference = model(idx)
    model.compute_dtype = torch.bfloat16
    cache = HybridCache(config, 2, 16, dtype=torch.bfloat16)
    for logits in (model(idx), model(idx, cache=cache)):
        assert (logits - reference).norm() / reference.norm() < 0.03
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------
# generate


def greedy_by_full_forward(model, ids, n, penalty=1.0):
    for _ in range(n):
        logits = model(ids)[:, -1]
        if penalty != 1:
            for token in ids[0].unique():
                score = logits[0, token]
                logits[0, token] = score / penalty if score > 0 else score * penalty
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, -n:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("T", [1, 2, 6])
def test_generate_greedy_equals_full_forwards(T, penalty):
    """The repetition penalty must see what was generated, not the prompt alone."""
    model, ids = random_model(small_config()), torch.randint(0, 40, (1, T))
    model.lm_head.weight.data[[41, 45]] = 0  # never choose a stop token
    tokens = list(model.generate(ids, 12, temperature=0, repetition_penalty=penalty))
    assert tokens == greedy_by_full_forward(model, ids, 12, penalty)
    assert all(type(token) is int for token in tokens)


@pytest.mark.parametrize("from_end", [9, 5])
def test_generate_stops_at_bos_and_assistant_end(from_end):
    """The published code waited for token 2, a byte, and never stopped."""
    model = random_model(small_config())
    model.lm_head.weight.data[50 - from_end] = 0
    first = next(model.generate(torch.tensor([[1, 2]]), 1, temperature=0))
    model.lm_head.weight.data[50 - from_end] = model.lm_head.weight.data[first] * 2
    assert list(model.generate(torch.tensor([[1, 2]]), 8, temperature=0)) == []


def test_generate_seeds():
    model, ids = random_model(small_config()), torch.tensor([[1, 2, 3]])

    def run(seed):
        return list(model.generate(ids, 20, temperature=3.0, seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


@torch.no_grad()
def test_generate_samples_the_same_with_and_without_the_cache():
    """As the article's program asks for it: each token from a full forward over all before it."""
    model, ids = random_model(small_config()), torch.tensor([[1, 2, 3, 4]])
    model.lm_head.weight.data[[41, 45]] = 0
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    cached = list(model.generate(ids, 25, **settings, repetition_penalty=1.15, seed=3))
    generator = torch.Generator().manual_seed(3)
    for _ in cached:
        logits = penalize_repetition(model(ids)[:, -1], ids, 1.15)
        ids = torch.cat([ids, sample(logits, SamplingParams(**settings), generator)], dim=1)
    assert cached == ids[0, 4:].tolist()
    assert len(set(cached)) > 5


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0}]
)
def test_generate_refuses_senseless_settings(bad):
    model = random_model(small_config())
    with pytest.raises(ValueError, match=next(iter(bad))):
        next(model.generate(torch.tensor([[1]]), 4, **bad))
    with pytest.raises(ValueError, match="shape"):
        next(model.generate(torch.tensor([[1], [2]]), 4))
    with pytest.raises(ValueError, match="max_new_tokens=-3"):
        next(model.generate(torch.tensor([[1]]), -3))


def kept_bytes(model, idx):
    """Bytes that a forward keeps for its backward, weights aside."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(idx, idx)
    loss.backward()
    return sum(kept.values()), [p.grad.clone() for p in model.parameters()]


def test_activation_checkpointing():
    """The same gradients with a fraction of the memory; a forward without gradients does not pay for it."""
    model = random_model(small_config(n_layer=6, n_embd=32))
    idx = torch.randint(0, 40, (2, 16))
    plain_bytes, plain = kept_bytes(model, idx)
    model.zero_grad()
    model.checkpoints_activations = True
    fewer_bytes, gradients = kept_bytes(model, idx)
    assert fewer_bytes < plain_bytes / 3
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))


def test_cudnn_attends_on_full_rows_alone(monkeypatch):
    """It plans a kernel for each length: finetuning, a new width every step, paid for a plan every step."""
    model, attend, found = random_model(small_config(n_layer=2)), F.scaled_dot_product_attention, []

    def noted(*args, **settings):
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **settings)

    def may_use_cudnn(T, **settings):
        found.clear()
        model.hidden(torch.zeros(2, T, dtype=torch.int64), **settings)
        return all(found)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    torch.backends.cuda.enable_cudnn_sdp(True)  # the process's: two threads that decode at once leave it off
    T = model.config.sequence_len
    assert may_use_cudnn(T)
    assert not may_use_cudnn(T - 1)
    assert not may_use_cudnn(T, cache=model.new_cache(2, T))
    model.checkpoints_activations = True  # the backward, outside of the context, must choose the same
    assert may_use_cudnn(T - 1)
    model.eval()
    assert not may_use_cudnn(T)
