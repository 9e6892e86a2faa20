"""Requests to the chat server in tests, and how to read its responses."""

import json

MESSAGES = [{"role": "user", "content": "the river"}]
HELLO = {"messages": MESSAGES}
DONE = 'data: {"done": true}'


def user(text):
    return {"role": "user", "content": text}


def chat(client, **fields):
    return client.post("/chat/completions", json={**HELLO, **fields})


def lines(response):
    """Return the events of a stream."""
    assert response.status_code == 200
    assert response.text.endswith("\n\n")
    return response.text.removesuffix("\n\n").split("\n\n")


def reply_text(response):
    return text_of(lines(response))


def text_of(events):
    return "".join(json.loads(line[6:]).get("token", "") for line in events)


def error_message(response, status):
    """Check the status and the format of an error, and return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]["message"]
