"""What only a GPU can show: compiled blocks, bfloat16, the compiled optimizer, and a run through it all."""

import json

import pytest
import torch

from nanochat.cache import HybridCache
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.metrics import read_metrics
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.sampling import GREEDY
from nanochat.train import accelerate as acceleration
from nanochat.train.accelerate import accelerate, why_not_fused
from scripts import base_train, chat_eval, chat_rl, chat_sft, mid_train, tok_train
from tasks import mixtures as recipes
from tests.helpers import chats
from tests.helpers.models import SECOND, random_model, small_config
from tests.helpers.vocabulary import train_tokenizer
from tests.helpers.wordtask import WordTask

pytestmark = pytest.mark.gpu


def relative_error(value, reference):
    return ((value.double().cpu() - reference).norm() / reference.norm()).item()


def loss_and_gradients(model, idx):
    model.zero_grad()
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters()}
    model.zero_grad()  # moving the model must not move the gradients that are returned
    return loss.detach().double().cpu(), gradients


@pytest.mark.parametrize("slc_rate", [0, 3])
@pytest.mark.parametrize(("fused", "has_large_tiles"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_loss_and_gradients_against_float64(slc_rate, compiled, fused, has_large_tiles, monkeypatch):
    """Head counts that are no power of two and odd lengths, with random non-zero weights; a smaller card."""
    if not has_large_tiles:
        monkeypatch.setattr(acceleration, "has_large_tiles", lambda device: False)
    config = GPTConfig(64, 200, 4, 3, 3, 3 * 64, 3, slc_rate)
    model = random_model(config)
    idx = torch.randint(0, 200, (2, 38))
    reference_loss, reference = loss_and_gradients(model.double(), idx)
    model = model.float().cuda()
    accelerate(model, compile=compiled, fused=fused)
    loss, gradients = loss_and_gradients(model, idx.cuda())
    assert loss.item() == pytest.approx(reference_loss.item(), rel=5e-3)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert relative_error(gradient, reference[name]) < 0.04, name


@pytest.mark.parametrize("compiled", [False, True])
def test_8_bit_loss_and_gradients_against_float64(compiled):
    model = random_model(GPTConfig(64, 208, 4, 3, 3, 3 * 64, 3, 3))
    idx = torch.randint(0, 208, (2, 65))
    reference_loss, reference = loss_and_gradients(model.double(), idx)
    model = model.float().cuda()
    if reason := why_not_fused(model, fp8=True):
        pytest.skip(reason)
    accelerate(model, compile=compiled, fused=True, fp8=True)
    loss, gradients = loss_and_gradients(model, idx.cuda())
    assert loss.item() == pytest.approx(reference_loss.item(), rel=2e-2)
    for name, gradient in gradients.items():
        assert relative_error(gradient, reference[name]) < 0.3, name


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize(
    "plan",
    [
        {"slc_rate": 0},
        {"slc_rate": 2},
        {"slc_rate": 3, "n_kv_head": 1},
        {"slc_rate": 0, **SECOND},
        {"slc_rate": 3, "n_kv_head": 1, **SECOND},
    ],
    ids=str,
)
def test_decode_is_the_full_forward(dtype, tolerance, plan):
    config = small_config(n_embd=64, **plan)
    model = random_model(config).cuda()
    model.compute_dtype = dtype
    idx = torch.randint(0, 50, (3, 20), device="cuda")
    full = model(idx)
    cache = HybridCache(config, 3, 20, "cuda", dtype)
    bounds = [(0, 1), (1, 6), *((t, t + 1) for t in range(6, 20))]
    parts = torch.cat([model(idx[:, a:b], cache=cache) for a, b in bounds], dim=1)
    torch.testing.assert_close(parts, full, rtol=tolerance, atol=tolerance)


def test_generate_of_a_compiled_model_does_not_recompile():
    model = random_model(small_config(n_embd=64)).cuda()
    model.compile_blocks()
    idx = torch.randint(0, 40, (1, 8), device="cuda")
    model(idx, idx).backward()
    torch._dynamo.utils.counters.clear()
    assert len(list(model.generate(idx, 20, temperature=0))) <= 20
    assert not torch._dynamo.utils.counters["stats"]


def test_optimizer_step_is_that_of_the_cpu():
    """Muon runs in bfloat16 and compiled there, in float32 here: the same direction within bfloat16."""
    models = [random_model(small_config(n_embd=64)) for _ in range(2)]
    models[1].cuda()
    start = [p.detach().clone() for p in models[0].parameters()]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in models[0].parameters()]
    for model in models:
        optimizer = build_optimizer(model, OptimizerConfig())
        for _ in range(2):
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = gradient.to(p.device)
            optimizer.step()
    for p, q, s in zip(models[0].parameters(), models[1].parameters(), start, strict=True):
        assert relative_error(q.detach() - s.cuda(), (p.detach() - s).double()) < 0.05


def test_what_trains_is_said(caplog):
    """cuDNN's attention on Hopper, where it is the fastest by far."""
    model = GPT(GPTConfig(256, 64, 2, 2, 2, 256), torch.bfloat16).cuda()
    with caplog.at_level("INFO"):
        accelerate(model, compile=False, fused=True)
    assert "training by" in caplog.text
    if torch.cuda.get_device_capability() == (9, 0):
        assert "training by kernels; attention by CUDNN_ATTENTION" in caplog.text


def test_init_on_the_device():
    model = GPT(small_config(), torch.bfloat16).cuda()
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


def test_train_and_resume(tmp_path, base_dir):
    """The compiled run learns, and goes on after a stop without a jump in its loss."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    for i in range(40):
        text = " ".join(words[(i * j + j // 3) % 5] for j in range(200))
        (tmp_path / f"{i}.txt").write_text(text)
    data = f"--data={tmp_path}/*.txt"
    tok_train.main([data, "--vocab-size=300"])
    flags = [data, "--depth=4", "--max-seq-len=128", "--device-batch-size=4", "--total-batch-size=1024"]
    flags += [
        "--num-iterations=30",
        "--eval-every=10",
        "--save-every=20",
        "--sample-every=0",
        "--keep-last=0",
    ]
    base_train.main(flags)
    directory = base_dir / "base_checkpoints" / "d4"
    losses = [r["loss"] for r in read_metrics(directory / "metrics.jsonl") if "loss" in r]
    result = json.loads((base_dir / "report" / "base_train.json").read_text())
    assert result["val_bpb"] < 0.6 * result["first_val_bpb"]
    assert result["peak_memory_bytes"] > 0
    for path in directory.glob("*_000030*"):
        path.unlink()
    base_train.main([*flags, "--resume"])
    resumed = [r["loss"] for r in read_metrics(directory / "metrics.jsonl") if "loss" in r]
    assert resumed[:20] == losses[:20]
    assert resumed[20:] == pytest.approx(losses[20:], rel=0.05)


def test_batch_of_prompts_of_different_lengths_is_each_alone():
    """In float32: bfloat16 kernels differ with the batch. Rows end, and leave, at different times."""
    tokenizer = train_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.get_vocab_size(), n_embd=64)).cuda()
    model.compute_dtype = torch.float32
    engine = Engine(model, tokenizer)
    prompts = [tokenizer.encode("the river " * n, prepend="<|bos|>") for n in (1, 7, 2, 5)]
    together = engine.complete(prompts, max_tokens=24, sampling=GREEDY)
    alone = [engine.complete([prompt], max_tokens=24, sampling=GREEDY)[0] for prompt in prompts]
    assert together == alone


def test_midtraining_to_reinforcement_learning(base_dir, monkeypatch):
    """Every later stage in bfloat16, midtraining compiled; the report has all of them."""
    chats.write_base_checkpoint(base_dir)
    chats.learn(monkeypatch, chats.ColourTask(60))
    monkeypatch.setattr(recipes, "eval_tasks", lambda data: {"Colour": lambda: chats.ColourTask(30, seed=2)})
    monkeypatch.setattr(recipes, "rl_tasks", lambda data: (WordTask(), WordTask()))
    mid_train.main(["--device-batch-size=4", "--total-batch-size=384", "--num-iterations=20"])
    chat_sft.main(["--conversations-per-step=8", "--num-iterations=20", "--init-lr-frac=1"])
    chat_eval.main(["-i", "sft", "--bench"])
    chat_rl.main(["--num-steps=3", "--examples-per-step=2", "--num-samples=4", "--max-new-tokens=8"])
    for stage in ("mid_train", "chat_sft", "chat_eval_sft", "chat_rl"):
        assert (base_dir / "report" / f"{stage}.json").exists()
    result = json.loads((base_dir / "report" / "mid_train.json").read_text())
    assert result["val_bpb"] < 0.8 * result["first_val_bpb"]
