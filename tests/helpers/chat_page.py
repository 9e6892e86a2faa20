"""Actions and locators for tests of the chat page, and an answer with every kind of Markdown it draws."""

import json
from contextlib import contextmanager

from playwright.sync_api import expect

PATIENCE_S = 30
expect.set_options(timeout=1000 * PATIENCE_S)


def box(page):
    return page.get_by_role("textbox", name="Message")


def say(page, text):
    box(page).fill(text)
    box(page).press("Enter")


def answers(page):
    return page.locator("article.assistant .prose")


def finish(page):
    """Wait until no answer is in progress."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def exchange(page, text, number=0):
    """Send a message and wait for the answer."""
    say(page, text)
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    expect(answers(page)).to_have_count(number + 1)


def ask(page, chat_server, reply):
    """Ask one question; return the locator of the rendered answer."""
    chat_server.replies = [reply]
    exchange(page, "Go")
    return answers(page)


def sent(chat_server, number=-1):
    return [(message["role"], message["content"]) for message in chat_server.requests[number]["messages"]]


def chat_button(page, title):
    return page.get_by_label("Conversations", exact=True).get_by_role("button", name=title, exact=True)


def stored_chat(chat_id, num_messages):
    """Return the entry of a conversation in the browser's storage."""
    messages = []
    for i in range(0, num_messages, 2):
        messages.append({"role": "user", "content": f"question {i}"})
        messages.append({"role": "assistant", "content": f"- answer **{i}**", "tools": []})
    chat = {"id": chat_id, "title": "Long", "updated": 1, "draft": "", "messages": messages}
    return {f"iberis:chat:{chat_id}": json.dumps(chat)}


@contextmanager
def at_most(seconds, page):
    """Require that the page computes for at most `seconds`; waiting for a CPU core does not count."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def computed():
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    before = computed()
    yield
    assert 0 < computed() - before < seconds


MARKDOWN = """# Title
Some **bold**, *slanted*, _slanted too_, `code *x*` and 2*3*4, __init__, snake_case_name.
- one
  - deeper
- two

1. first
2. second
* star
```python
if x < 1:
    print("**no**")
```
[site](https://example.org/a_(b)) end"""
