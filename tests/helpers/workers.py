"""Small workers for tests, and readers of their requests."""

import itertools
import queue
import random

import torch

from nanochat.sampling import SamplingParams
from nanochat.serve.protocol import Request, Token
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

TOKENIZER = train_tokenizer()


def small_model(**changes):
    shape = {"sequence_len": 64, "vocab_size": TOKENIZER.get_vocab_size(), **changes}
    return random_model(small_config(**shape)).eval()


def next_token_model(chain, then):
    """Return a model whose greedy next tokens follow a chain, and the pairs in `then`; it has no mixers."""
    model = small_model(vocab_size=TOKENIZER.get_vocab_size(), n_embd=48, n_head=2)
    followers = {**dict(itertools.pairwise(chain)), **then}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                parameter.zero_()
        embeddings = torch.nn.functional.normalize(model.transformer.wte.weight)
        for token, follower in followers.items():
            model.lm_head.weight[follower] = 4 * embeddings[token]
    return model


class Reader:
    """Submits a request and collects its events."""

    def __init__(self, worker, *, tokens, max_tokens, n=1, logprobs=None, **sampling):
        self.events = queue.Queue()
        self.n = n
        request = Request(
            tokens=tokens, max_tokens=max_tokens, sampling=SamplingParams(**sampling), n=n, logprobs=logprobs
        )
        self.handle = worker.submit(request, self.events.put)
        self.tokens = [[] for _ in range(self.n)]
        self.ends = {}

    def next(self):
        event = self.events.get(timeout=60)
        if isinstance(event, Token):
            assert event.sample not in self.ends
            self.tokens[event.sample].append(event.token)
        else:
            assert event.sample not in self.ends
            self.ends[event.sample] = event.reason
        return event

    def all(self):
        while len(self.ends) < self.n:
            self.next()
        assert self.events.empty()
        return self


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.randint(1, 30))] for _ in range(n)]
