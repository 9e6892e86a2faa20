"""Fixtures with OpenAI's own client of the chat server, for test modules that name it in pytest_plugins."""

import openai
import pytest

from tests.helpers.chat_client import MESSAGES


@pytest.fixture(scope="module")
def openai_client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def ask(openai_client):
    """Return a function that sends a chat."""

    def ask(**fields):
        return openai_client.chat.completions.create(model="d2-fake", messages=MESSAGES, **fields)

    return ask


@pytest.fixture
def continue_(openai_client):
    """Return a function that sends a prompt."""

    def continue_(**fields):
        return openai_client.completions.create(model="d2-fake", **{"prompt": "the river", **fields})

    return continue_
