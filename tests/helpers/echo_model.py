"""A model with a known answer to every prompt, which depends on the whole decode state of its own row.

A prompt has at least 3 tokens and contains one capital letter of KEYS. The class of a token is id % 26, and
the answer consists of lowercase letters, one for each class: tokens of classes a, b, c are followed by the
letter of class a + stride, where the key determines the stride, 1 to 16. So a row needs the input of the
first layer's convolution two tokens ago, and the key in its own prompt. With the state of another row, or of
the previous request in its slot, the rest of the answer has other letters. The values are far apart, so that
rounding to bfloat16 changes nothing. The first ids of the tokenizer must be the bytes.

Layers 0 (SLC2) and 1 (attention) compute the answer in a model of any size. The residual stream holds:

    class       one-hot, of the token           embedding
    one, is_key 1; 1 where the token is a key, else -1
    before      one-hot, class two tokens ago   layer 0: only the oldest tap of the convolution is nonzero
    key         one-hot, class of the key       layer 1: q = one, k = is_key, in the slowest plane of RoPE
    next        one-hot, class to come          MLP of layer 1: one unit per pair of before and key
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import torch

from nanochat.chat_format import render_for_completion
from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from tests.helpers.vocabulary import WORDS, train_tokenizer

KEYS = string.ascii_uppercase[:16]
CLASSES = 26
LETTERS = {ord(letter) % CLASSES: letter for letter in string.ascii_lowercase}
STRIDES = {ord(key) % CLASSES: stride for stride, key in enumerate(KEYS, start=1)}  # by class
CLASS, ONE, IS_KEY, BEFORE, KEY, NEXT = 0, 26, 27, 28, 54, 80
WIDTH = 106


def echo_config(vocab_size: int, **changes: int) -> GPTConfig:
    """Return a small shape that the model fits; `changes` may add layers and width."""
    shape = {"n_layer": 2, "n_head": 1, "n_kv_head": 1, "n_embd": 128, "sequence_len": 1024}
    return GPTConfig(vocab_size=vocab_size, **{**shape, **changes})


@torch.no_grad()
def echo_model(config: GPTConfig) -> GPT:
    """Return the model on the CPU in eval mode; raise ValueError if it does not fit the shape."""
    if config.layer_kinds[:2] != ("slc2", "attention") or config.n_embd < WIDTH or config.head_dim < 64:
        raise ValueError(f"{config}: layers slc2, attention, ..., {WIDTH} wide, heads of 64 are needed")
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.zero_()
    E, D = config.n_embd, config.head_dim
    classes = torch.arange(CLASSES)

    ids = torch.arange(config.vocab_size)
    embedding = model.transformer.wte.weight
    embedding[ids, ids % CLASSES] = 1
    embedding[:, ONE] = 1
    embedding[:, IS_KEY] = -1
    embedding[[ord(key) for key in KEYS], IS_KEY] = 1
    unit = (E / 3) ** 0.5  # the value of these ones after the norm

    slc2 = model.transformer.h[0].attn
    slc2.alpha_proj.weight[:, ONE] = 4 / unit
    slc2.A_proj.weight[:, ONE] = 1 / unit  # a gate of about 4
    slc2.x_proj.weight[classes, CLASS + classes] = 1 / unit
    slc2.conv1d.weight[:, 0, 0] = 1
    slc2.B_proj.weight[:, ONE] = 1 / unit
    slc2.c_proj.weight[BEFORE + classes, classes] = unit / 4

    attention = model.transformer.h[1].attn
    slowest = D // 2 - 1
    attention.c_q.weight[slowest, ONE] = 1
    attention.c_k.weight[slowest, IS_KEY] = 1
    attention.c_v.weight[classes, CLASS + classes] = 1
    attention.c_proj.weight[KEY + classes, classes] = unit / (E / 4) ** 0.5

    mlp = model.transformer.h[1].mlp
    pairs = [(before, key) for before in range(CLASSES) for key in STRIDES]
    for i, (before, key) in enumerate(pairs):
        mlp.c_fc.weight[i, BEFORE + before] = mlp.c_fc.weight[i, KEY + key] = 1
        mlp.c_fc.weight[i, ONE] = -1.5
        mlp.c_proj.weight[NEXT + (before + STRIDES[key]) % CLASSES, i] = 4 * unit / (0.25 * E / 5)

    for number, letter in LETTERS.items():
        model.lm_head.weight[ord(letter), NEXT + number] = 30 / E**0.5
    return model


def echo(tokenizer: RustBPETokenizer, tokens: list[int], length: int) -> str:
    """Return the model's answer to a prompt; raise ValueError if the prompt has none."""
    keys = [token % CLASSES for token in tokens if token in map(ord, KEYS)]
    if len(tokens) < 3 or len(keys) != 1:
        prompt = tokenizer.decode(tokens)
        raise ValueError(f"{prompt!r} must have 3 tokens or more, and exactly one of the letters {KEYS}")
    classes = [token % CLASSES for token in tokens]
    for _ in range(length):
        classes.append((classes[-3] + STRIDES[keys[0]]) % CLASSES)
    return "".join(LETTERS[number] for number in classes[len(tokens) :])


def questions(tokenizer: RustBPETokenizer, count: int, longest: int, seed: int = 0) -> list[dict]:
    """Return chat requests of up to `longest` words with answers, in the format of bench_serve --expect."""
    rng = random.Random(seed)
    words = [word for word in WORDS if word.strip()]
    found = []
    for i in range(count):
        prompt = rng.choices(words, k=longest * i // count)
        prompt.insert(rng.randrange(len(prompt) + 1), rng.choice(KEYS))
        messages = [{"role": "user", "content": " ".join(prompt)}]
        max_tokens = rng.randint(5, 100)
        tokens = render_for_completion(tokenizer, {"messages": messages}, 1 << 20)
        answer = echo(tokenizer, tokens, max_tokens)
        found.append({"messages": messages, "max_tokens": max_tokens, "answer": answer})
    return found


def save_echo(longest: int = 150, **changes: int) -> Path:
    """Save the tokenizer and an SFT checkpoint "echo" to the base directory; return the file for --expect.

    To check a GPU, where rounding depends on the other rows of a batch:

        python -c "from tests.helpers.echo_model import save_echo; print(save_echo(sequence_len=2048))"
        python -m scripts.chat_web -g echo &
        python -m scripts.bench_serve --expect=$NANOCHAT_BASE_DIR/expect.jsonl
    """
    tokenizer = train_tokenizer()
    tokenizer.save(base_dir() / "tokenizer")
    model = echo_model(echo_config(tokenizer.get_vocab_size(), **changes))
    save_checkpoint(checkpoint_dir("sft", "echo"), 0, model, None, {})
    path = base_dir() / "expect.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions(tokenizer, 64, longest)))
    return path
