import pytest

from nanochat.cache import HybridCache
from tests.helpers.models import small_config


@pytest.mark.parametrize(("sizes", "message"), [((0, 4), "batch_size=0"), ((2, 0), "max_len=0")])
def test_an_empty_cache_is_refused(sizes, message):
    """It was created, and the first forward failed at the maximum of an empty list."""
    with pytest.raises(ValueError, match=f"{message} must be at least 1"):
        HybridCache(small_config(), *sizes)
