"""The four implementations of each layer agree, and a change in one place only is refused.

nanochat/gpt.py, nanochat/slc2.py                       plain: the equations, and decoding with a cache
nanochat/train/fused.py, nanochat/kernels/train         training kernels
nanochat/decode/graph_model.py, kernels/decode          decoding kernels
nanochat/hub/transformers_model/modeling_...            the exported file
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanochat import attention, gpt, ops, slc2
from nanochat.attention import CausalSelfAttention
from nanochat.decode import graph_check, graph_model
from nanochat.decode.graph_check import check_decoder
from nanochat.decode.graph_decoder import GraphDecoder
from nanochat.decode.running import decoder_for
from nanochat.gpt import GPT, GPTConfig
from nanochat.hub.export_check import check_exported_code
from nanochat.hub.transformers_model.cache_saint_iberis import SaintIberisConv
from nanochat.kernels.decode.attention import attend
from nanochat.kernels.train import look_up, mlp, share
from nanochat.kernels.train import slc2 as kernels_slc2
from nanochat.layer_check import BOUND_8_BITS, BOUNDS, check_ops, noise_for_zeros
from nanochat.ops import PLAIN
from nanochat.train.accelerate import accelerate, why_not_fused
from nanochat.train.fused import fused_ops
from tests.helpers.models import SECOND

pytestmark = pytest.mark.slow

CONFIG = GPTConfig(4, 64, 2, 2, 1, 2 * 16, 3, 3)
SMALL_TILE = mlp.Tile(16, 16, 16, 4, 1)


@pytest.fixture
def model(device, monkeypatch):
    """A model to train from, with the zeros of init_weights."""
    if device == "cpu":
        monkeypatch.setattr(mlp, "FORWARD", SMALL_TILE)
        monkeypatch.setattr(mlp, "BACKWARD", SMALL_TILE)
        monkeypatch.setattr(kernels_slc2, "CONV_BLOCKS", 1)
    torch.manual_seed(0)
    model = GPT(CONFIG, torch.float32 if device == "cpu" else torch.bfloat16).to(device)
    model.init_weights()
    return model


def check_training(model):
    check_ops(model, fused_ops(), BOUNDS[model.activation_dtype])


def check_decoding(model):
    check_decoder(GraphDecoder(model.eval(), slots=2), model)


def check_export(model):
    check_exported_code(model.config)


CHECKS = [check_training, check_decoding, check_export]


@pytest.mark.parametrize("check", CHECKS)
def test_all_agree_and_nothing_is_left_behind(check, model):
    """Weights, among them those that are zero, and the random state are what they were before."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_second_generation_is_trained_as_it_is_written(model, monkeypatch):
    """Convolutions and gate, changed in the plain functions alone; shares and look-up, in the kernels."""
    second = GPT(replace(CONFIG, **SECOND), model.compute_dtype).to(model.device)
    second.init_weights()
    check_training(second)

    plain = attention.residual_conv
    changes = [
        (attention, "residual_conv", lambda u, w, window=None: plain(u, w.flip(-1), window), "layer 1 .att"),
        (attention.torch, "sigmoid", torch.tanh, "layer 1 .attention."),
        (ops, "residual_conv", lambda u, w, window=None: plain(u, 2 * w, window), "layer 0 .join to"),
        (share, "share", ops.share, "the embedding in every layer"),
        (look_up, "look_up", values_of_the_token_before, "value embeddings"),
    ]
    for module, name, replacement, layer in changes:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, replacement)
            with pytest.raises(ValueError, match=layer):
                check_training(second)


def doubled_gate(x, alpha, A):
    return F.silu((2 * F.silu(alpha)).unsqueeze(-1) * A.unsqueeze(-2)).flatten(-2) * x


def reversed_conv(u, weight, window=None, conv=slc2.short_conv):
    return conv(u, weight.flip(-1), window)


CHANGES = {
    "slc2 gate": (slc2, "gate", doubled_gate, "layer 0 .slc2."),
    "slc2 convolution": (slc2, "short_conv", reversed_conv, "layer 0 .slc2."),
    "attention": (attention, "apply_rotary", lambda x, cos, sin: x * cos.mean(), "layer 1 .attention."),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changed_in_one_place_is_refused(check, change, model, monkeypatch):
    """With the gate replaced in slc2.py, the kernels went on computing the old one, silently."""
    module, name, replacement, layer = CHANGES[change]
    monkeypatch.setattr(module, name, replacement)
    way_out = {
        check_training: "--fused=False",
        check_decoding: "--decoder=plain",
        check_export: "export with the version",
    }[check]
    with pytest.raises(ValueError, match=rf"{layer}.*differ by .* %.*{way_out}"):
        check(model)


@pytest.mark.parametrize("check", CHECKS)
def test_a_changed_mlp_is_refused(check, model, monkeypatch):
    """Its c_proj is zero at the start, which made all MLPs alike."""
    monkeypatch.setattr(ops.F, "relu", torch.Tensor.abs)
    if check is check_export:
        pytest.skip("the exported file reads the same torch.nn.functional")
    with pytest.raises(ValueError, match=r"layer 0 .MLP."):
        check(model)


def flipped_residual_conv(u, weight, window=None, conv=attention.residual_conv):
    return conv(u, weight.flip(-1), window)


def louder_x0(x, delta, link, join=ops.join):
    if link.mix is not None:
        resid_scale, x0_scale, x0 = link.mix
        link = link._replace(mix=(resid_scale, 1.5 * x0_scale, x0))
    return join(x, delta, link)


def only_sums(u, out, *args, rows=graph_model.residual_conv_rows, **add):
    return rows(u, out, *args, **add) if add else out.copy_(u)


# what is changed, and the layer that is refused; the last two are changed in the kernels' model
CHANGES_OF_SECOND = {
    "convolution of keys": (attention, "residual_conv", flipped_residual_conv, "layer 1 .attention."),
    "gate of values": (attention.torch, "sigmoid", torch.tanh, "layer 1 .attention."),
    "convolution of the MLP": (ops, "residual_conv", flipped_residual_conv, "layer 0 .MLP."),
    "x0": (graph_check, "join", louder_x0, "the embedding"),
    "convolution of outputs": (
        graph_model, "residual_conv_rows", only_sums, "layer 1 .attention."
    ),
    "scale of scores": (
        graph_model, "attend", lambda *args: attend(*args[:7], 1.0, *args[8:]), "layer 1 .attention."
    ),
}  # fmt: skip


def test_the_second_generation_is_decoded_as_it_is_written(model, monkeypatch):
    second = GPT(replace(CONFIG, **SECOND), model.compute_dtype).to(model.device).eval()
    second.init_weights()
    before = {name: p.clone() for name, p in second.named_parameters()}
    decoder = GraphDecoder(second, slots=2)
    check_decoder(decoder, second)
    assert all(torch.equal(p, before[name]) for name, p in second.named_parameters())
    for module, name, replacement, layer in CHANGES_OF_SECOND.values():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, replacement)
            with pytest.raises(ValueError, match=f"{layer}.*differ by"):
                check_decoder(decoder, second)


def join_without_embedding(x, delta, link, norm=ops.norm, join=ops.join):
    return join(x, delta, link._replace(mix=None), norm)


class Unscaled(CausalSelfAttention):
    def __init__(self, config):
        super().__init__(replace(config, score_scale=1.0))


class DoubledValues(CausalSelfAttention):
    def forward(self, h, cos, sin, value_embeds, *rest):
        return super().forward(h, cos, sin, 2 * value_embeds, *rest)


class ReversedOutput(CausalSelfAttention):
    def forward(self, h, cos, sin, value_embeds):
        return super().forward(h, cos, sin, value_embeds, conv=flipped_residual_conv)


def values_of_the_token_before(idx, *table, look_up=ops.look_up_values):
    return look_up(idx.roll(1, 1), *table)


CHANGES_OF_EXPORT = {
    "convolution of k": (attention, "residual_conv", flipped_residual_conv, "layer 1 .attention."),
    "convolution of y": (gpt, "CausalSelfAttention", ReversedOutput, "layer 1 .attention."),
    "convolution of m": (ops, "residual_conv", flipped_residual_conv, "layer 0 .MLP."),
    "gate of values": (gpt, "CausalSelfAttention", DoubledValues, "layer 1 .attention."),
    "scores": (gpt, "CausalSelfAttention", Unscaled, "layer 1 .attention."),
    "embedding": (gpt, "PLAIN", replace(PLAIN, join=join_without_embedding), "layer 0 .residual stream."),
    "values": (gpt, "PLAIN", replace(PLAIN, look_up_values=values_of_the_token_before), "the logits"),
}


@pytest.mark.parametrize("change", CHANGES_OF_EXPORT)
def test_an_export_of_a_changed_second_generation_is_refused(change, monkeypatch):
    config = replace(CONFIG, n_layer=4, **SECOND)
    check_exported_code(config)
    module, name, replacement, layer = CHANGES_OF_EXPORT[change]
    monkeypatch.setattr(module, name, replacement)
    with pytest.raises(ValueError, match=rf"{layer}.*differ by .* %.*export with the version"):
        check_exported_code(config)


@pytest.mark.parametrize("name", ["k", "y", "mlp", "u"])
def test_an_export_that_forgets_a_window_is_refused(name, monkeypatch):
    """The output of the convolution is right as long as all tokens come at once."""
    forward = SaintIberisConv.forward

    def forgetful(self, u, is_token, cache):
        return forward(self, u, is_token, None if self.key[1] == name else cache)

    monkeypatch.setattr(SaintIberisConv, "forward", forgetful)
    with pytest.raises(ValueError, match=r"decoding: the exported file.*differ by .* %"):
        check_exported_code(replace(CONFIG, n_layer=4, **SECOND))


@pytest.mark.parametrize(
    "changes", [{"n_head": 1, "n_kv_head": 1}, {"slc_rate": 0, "residual_conv": 1}], ids=str
)
def test_every_shape_of_the_second_generation_can_be_exported(changes):
    """The gate of values reads 12 channels: a narrower model for the comparison would have fewer."""
    check_exported_code(replace(CONFIG, **{**SECOND, **changes}))


def test_noise_is_for_zeros_alone():
    module = torch.nn.ModuleDict({"zero": torch.nn.Linear(3, 2, bias=False), "one": torch.nn.Linear(2, 1)})
    torch.nn.init.zeros_(module["zero"].weight)
    kept = module["one"].weight.clone()
    with noise_for_zeros(module) as has_noise:
        assert has_noise
        assert module["zero"].weight.all()
        assert torch.equal(module["one"].weight, kept)
    assert not module["zero"].weight.any()

    def interrupted():
        with noise_for_zeros(module):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not module["zero"].weight.any()
    with noise_for_zeros(module["one"]) as has_noise:
        assert not has_noise


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_training_refuses_before_the_first_step(fp8, monkeypatch):
    model = GPT(GPTConfig(64, 64, 2, 2, 2, 2 * 64, 3, 3), torch.bfloat16).cuda()
    model.init_weights()
    if reason := why_not_fused(model, fp8):
        pytest.skip(reason)
    accelerate(model, compile=False, fused=True, fp8=fp8)
    monkeypatch.setattr(slc2, "gate", doubled_gate)
    with pytest.raises(ValueError, match="fused=False"):
        accelerate(model, compile=False, fused=True, fp8=fp8)
    accelerate(model, compile=False, fused=False)


@pytest.mark.gpu
def test_serving_refuses_before_the_first_token(monkeypatch):
    model = GPT(GPTConfig(64, 64, 2, 2, 2, 2 * 64, 3, 3), torch.bfloat16).cuda().eval()
    model.init_weights()
    assert isinstance(decoder_for(model, 2), GraphDecoder)
    monkeypatch.setattr(slc2, "gate", doubled_gate)
    with pytest.raises(ValueError, match="decoder=plain"):
        decoder_for(model, 2)


def test_bounds_leave_room_for_rounding_alone():
    assert max(BOUNDS.values()) <= 0.05 < BOUND_8_BITS <= 0.25
