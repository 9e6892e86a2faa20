"""The words to spell: the list from the web, downloaded once, and the most frequent words of a text."""

import pytest

from tasks import words
from tests.helpers.hub_server import HubServer


@pytest.fixture
def server(monkeypatch, base_dir):
    from huggingface_hub import close_session

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    files = {
        "words_alpha.txt": b"a\r\naa\r\nzoo\r\n",
        "mine.txt": b"tree\nleaf\n",
        "bad.txt": b"tree\nna\xc3\xafve\n",
    }
    close_session()
    with HubServer(files) as server:
        yield server
    close_session()


def test_the_list_from_the_web_is_downloaded_once(server, base_dir, monkeypatch):
    assert words.WORDS_URL.startswith("https://raw.githubusercontent.com/dwyl/english-words/")
    monkeypatch.delenv("WORDS_URL", raising=False)
    monkeypatch.setattr(words, "WORDS_URL", server.address("words_alpha.txt"))
    for _ in range(2):
        assert words.english_words() == ["a", "aa", "zoo"]
    assert len(server.starts("words_alpha.txt")) == 1
    assert (base_dir / "words_alpha.txt").exists()


def test_its_address_is_a_setting(server, monkeypatch):
    """Lists of several addresses lie beside each other, so that none is taken for another."""
    for name, expected in (("words_alpha.txt", ["a", "aa", "zoo"]), ("mine.txt", ["tree", "leaf"])):
        monkeypatch.setenv("WORDS_URL", server.address(name))
        assert words.english_words() == expected


def test_lists_that_cannot_be_used(server, base_dir, monkeypatch):
    monkeypatch.setenv("WORDS_URL", server.address("bad.txt"))
    with pytest.raises(ValueError, match=r"bad\.txt must be words of the letters a to z, but has 'naïve'"):
        words.english_words()
    monkeypatch.setenv("WORDS_URL", server.address("none.txt"))
    with pytest.raises(OSError, match=r"cannot download the words to spell .*none\.txt.* copy .*WORDS_URL"):
        words.english_words()
    (base_dir / "empty.txt").touch()
    monkeypatch.setenv("WORDS_URL", "http://127.0.0.1:9/empty.txt")
    with pytest.raises(ValueError, match=r"empty\.txt has no words"):
        words.english_words()


def test_words_of_a_text_by_frequency(monkeypatch):
    monkeypatch.setattr(
        "tasks.words.parquets_iter_batched",
        lambda split, data: iter([["the cat and the dog", "a cat; The dog"], ["the cat and x2y Zed zed"]]),
    )
    assert words.text_words("any") == ["the", "cat", "and", "dog"]
    assert words.text_words("any", max_length=2) == []
    monkeypatch.setattr(words, "N_BATCHES", 1)
    assert words.text_words("any") == ["the", "cat", "dog"]
    monkeypatch.setattr(words, "MIN_LENGTH", 4)
    assert words.text_words("any") == []
