"""Small models exported for transformers.

Test modules take the fixtures with `pytest_plugins = "tests.helpers.exported"`.
"""

from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from nanochat.common import base_dir
from scripts import export_hf
from tests.helpers.models import SECOND, random_model, small_config
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Our model and tokenizer, the folder of their export, and the same loaded by transformers."""
    return _exported(tmp_path_factory.mktemp("exported") / "saint_iberis", {})


@pytest.fixture(scope="module")
def exported_second(tmp_path_factory):
    """The same of the second generation."""
    return _exported(tmp_path_factory.mktemp("exported_second") / "saint_iberis", SECOND)


@pytest.fixture(params=["exported", "exported_second"])
def either(request):
    """The one and the other."""
    return request.getfixturevalue(request.param)


def _exported(folder, changes):
    tokenizer = train_tokenizer()
    shape = {"vocab_size": VOCAB_SIZE, "n_layer": 5, "n_head": 4, "n_kv_head": 2, "n_embd": 40, **changes}
    model = random_model(small_config(**shape))
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
