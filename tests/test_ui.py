"""The chat page in a real browser, against a server that answers by script."""

import json
import os
import re
import shutil
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.fake_chat_server import HANG_UP, PAGE, WAIT, FakeChatServer, Refusal, tokens

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE_S = 30
expect.set_options(timeout=1000 * PATIENCE_S)
NO_BROWSER = "no browser: install chromium or set CHROMIUM to the path of one"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    """Each test has one of its own, and thereby an origin of its own: what the browser keeps is apart."""
    with FakeChatServer() as server:
        yield server


@pytest.fixture(scope="module")
def context(browser):
    return browser.new_context(locale="en-US")


@pytest.fixture
def open_page(browser, context, server):
    """Opens the page, with options in a profile of its own.

    What its console calls an error fails the test, except for refused requests.
    """
    opened, errors = [], []

    def open_page(script="", **options) -> Page:
        place = browser.new_context(**{"locale": "en-US", **options}) if options else context
        page = place.new_page()
        opened.append(place if options else page)
        page.add_init_script(script)
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        return page

    yield open_page
    for place in opened:
        place.close()
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


@pytest.fixture
def page(open_page):
    return open_page()


def box(page):
    return page.get_by_role("textbox", name="Message")


def say(page, text):
    box(page).fill(text)
    box(page).press("Enter")


def answers(page):
    return page.locator("article.assistant .prose")


def finish(page):
    """Wait until no answer is under way."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()


def exchange(page, text, number=0):
    """Send, and wait for the answer."""
    say(page, text)
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    expect(answers(page)).to_have_count(number + 1)


def ask(page, server, reply):
    """Return the answer, drawn, to one question."""
    server.replies = [reply]
    exchange(page, "Go")
    return answers(page)


def sent(server, number=-1):
    return [(message["role"], message["content"]) for message in server.requests[number]["messages"]]


def chat_button(page, title):
    return page.get_by_label("Conversations", exact=True).get_by_role("button", name=title, exact=True)


# ---- Asking


def test_text_appears_before_the_answer_ends(page, server):
    server.replies = [[*tokens("One ", "two"), WAIT, *tokens(" three")]]
    say(page, "Count")
    expect(answers(page)).to_have_text("One two")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator("#live")).to_have_text("")  # nothing is read out before the end
    server.go_on()
    expect(answers(page)).to_have_text("One two three")
    finish(page)
    expect(page.locator("#live")).to_have_text("Answer: One two three")
    assert sent(server) == [("user", "Count")]


def test_events_may_be_cut_anywhere(page, server):
    """Network reads end in the middle of lines and of characters."""
    line = 'data: {"token": "na\u00efve \U0001f338"}\r\n\r\n'.encode()
    reply = [b": a comment\n\n", *(line[i : i + 1] for i in range(len(line))), b'data: {"done": true}\n\n']
    expect(ask(page, server, [*reply, {"done": True}])).to_have_text("na\u00efve \U0001f338")


def test_history_goes_along_without_the_calls(page, server):
    call = {"tool": {"expression": "12*7", "result": "84"}}
    server.replies = [[*tokens("It is "), call, *tokens("84.")]]
    exchange(page, "What is 12*7?")
    exchange(page, "Sure?", 1)
    assert sent(server) == [("user", "What is 12*7?"), ("assistant", "It is 84."), ("user", "Sure?")]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_came(page, server, how):
    server.replies = [[*tokens("Once upon"), WAIT]]
    say(page, "Tell a story")
    expect(answers(page)).to_have_text("Once upon")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    finish(page)
    assert server.client_left.wait(PATIENCE_S)  # so that the server can stop too
    expect(answers(page)).to_have_text("Once upon")
    page.reload()
    expect(answers(page)).to_have_text("Once upon")


def test_stop_before_anything_came_gives_the_text_back(page, server):
    server.replies = [[WAIT]]
    say(page, "Wait")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(box(page)).to_have_value("Wait")
    expect(page.locator("article")).to_have_count(0)


def test_regenerate_replaces_the_last_answer(page, server):
    server.replies = [tokens("First."), tokens("Second.")]
    exchange(page, "Say it")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text(["Second."])
    assert sent(server, 0) == sent(server, 1) == [("user", "Say it")]


def test_failed_regenerate_keeps_the_old_answer(page, server):
    server.replies = [tokens("First."), Refusal(500)]
    exchange(page, "Say it")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("#notice")).to_contain_text("HTTP 500")
    expect(answers(page)).to_have_text(["First."])
    expect(box(page)).to_have_value("")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text(["Fine."])


def test_edit_cuts_what_follows(page, server):
    server.replies = [tokens("A."), tokens("B."), tokens("C.")]
    exchange(page, "one")
    exchange(page, "two", 1)
    box(page).fill("a draft")
    page.get_by_role("button", name="Edit").first.click()
    expect(box(page)).to_have_value("one")
    expect(page.locator("article.cut")).to_have_count(3)
    say(page, "uno")
    expect(answers(page)).to_have_text(["C."])
    finish(page)
    assert sent(server) == [("user", "uno")]
    expect(box(page)).to_have_value("a draft")


def test_escape_ends_an_edit_and_brings_the_draft_back(page):
    exchange(page, "one")
    box(page).fill("a draft")
    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    expect(box(page)).to_have_value("a draft")
    expect(page.locator("#editing")).to_be_hidden()


def test_failed_edit_loses_nothing(page, server):
    server.replies = [tokens("A."), Refusal(500)]
    exchange(page, "one")
    page.get_by_role("button", name="Edit").click()
    say(page, "uno")
    expect(page.locator("#notice")).to_contain_text("HTTP 500")
    expect(box(page)).to_have_value("uno")
    expect(page.locator("article.user .text")).to_have_text("one")
    page.keyboard.press("Escape")
    expect(box(page)).to_have_value("")


# ---- What goes wrong


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Refusal(429, {"error": {"message": "full"}}), "The server is busy. Try again in a moment."),
        (Refusal(429, headers={"Retry-After": "7"}), "The server is busy. Try again in 7 seconds."),
        (Refusal(500), "HTTP 500"),
        (Refusal(400, {"error": {"message": "too many messages"}}), "too many messages"),
        (Refusal(422, {"detail": [{"msg": "top_k too large"}]}), "top_k too large"),
        (Refusal(404, {"detail": "no such model"}), "no such model"),
        ([HANG_UP], "The connection was lost before the answer was complete."),
        ([b"data: {oops\n\n"], "The server said something that this page does not understand."),
        ([{"error": "the worker died"}], "the worker died"),
        ([{"error": {"message": "the model failed"}}], "the model failed"),
        ([], "The answer was empty."),
    ],
)
def test_errors_are_shown_and_leave_the_text(page, server, reply, message):
    server.replies = [reply]
    say(page, "Hello")
    expect(page.locator("#notice span")).to_have_text(message)
    expect(page.locator("#live")).to_have_text(message)
    expect(box(page)).to_have_value("Hello")
    expect(page.locator("article")).to_have_count(0)
    box(page).press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    expect(page.locator("#notice")).to_be_hidden()


def test_lost_connection_keeps_the_beginning(page, server):
    server.replies = [[*tokens("Half an"), WAIT, HANG_UP]]
    say(page, "Hello")
    expect(answers(page)).to_have_text("Half an")
    server.go_on()
    expect(page.locator("#notice span")).to_have_text(
        "The connection was lost before the answer was complete."
    )
    expect(answers(page)).to_have_text("Half an")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()


def test_no_server_at_all(open_page):
    with FakeChatServer() as server:
        page = open_page()
        page.goto(server.url)
    page.route("**/chat/completions", lambda route: route.abort("connectionrefused"))
    say(page, "Hello")
    expect(page.locator("#notice span")).to_have_text("No connection to the server.")
    expect(box(page)).to_have_value("Hello")


def test_key_is_asked_for_and_remembered(page, server):
    server.replies = [Refusal(401, {"error": {"message": "a key is needed"}})]
    say(page, "Hello")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    page.reload()
    exchange(page, "Again", 1)
    assert server.keys == [None, "Bearer secret", "Bearer secret"]


def test_a_wrong_key_is_asked_for_again(page, server):
    server.replies = [Refusal(401), Refusal(401)]
    say(page, "Hello")
    expect(page.get_by_text("It did not accept the last one.")).to_be_hidden()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("It did not accept the last one.")).to_be_visible()
    page.get_by_label("API key").fill("right")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    assert server.keys == [None, "Bearer wrong", "Bearer right"]


def test_no_key_given(page, server):
    server.replies = [Refusal(401, {"error": {"message": "a key is needed"}})]
    say(page, "Hello")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#notice span")).to_have_text("a key is needed")
    expect(box(page)).to_have_value("Hello")


def test_no_more_is_sent_than_the_server_takes(page, server):
    """32,000 characters in all and 8,000 a message; the oldest exchanges go, and no character is halved."""
    long_answer = "a" * 7999 + "\U0001f338" * 10
    server.replies = [tokens(long_answer) for _ in range(5)]
    for i in range(5):
        exchange(page, f"Question {i}", i)
    exchange(page, "Last", 5)
    messages = server.requests[-1]["messages"]
    assert sum(len(message["content"]) for message in messages) <= 32000
    asked = [message["content"] for message in messages[::2]]
    assert asked == ["Question 2", "Question 3", "Question 4", "Last"]
    assert messages[1]["content"] == "a" * 7999 + "\ufffd"
    note = page.get_by_text("Too long: what is above is no longer sent.")
    expect(note.locator("xpath=following-sibling::article").first).to_contain_text("Question 2")


def stored_chat(chat_id, num_messages):
    """What the browser would have kept of a conversation."""
    messages = []
    for i in range(0, num_messages, 2):
        messages.append({"role": "user", "content": f"question {i}"})
        messages.append({"role": "assistant", "content": f"- answer **{i}**", "tools": []})
    chat = {"id": chat_id, "title": "Long", "updated": 1, "draft": "", "messages": messages}
    return {f"iberis:chat:{chat_id}": json.dumps(chat)}


@contextmanager
def at_most(seconds, page):
    """So long may the page compute; the time in which it waits for a core does not count."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def computed():
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    before = computed()
    yield
    assert 0 < computed() - before < seconds


def test_very_long_conversation(page, server):
    page.evaluate("(chats) => Object.assign(localStorage, chats)", stored_chat("1", 600))
    page.reload()
    chat_button(page, "Long").click()
    expect(answers(page)).to_have_count(300)
    with at_most(3, page):
        exchange(page, "Last", 300)
    expect(answers(page).last).to_be_in_viewport()
    assert len(server.requests[0]["messages"]) == 499  # the first is the user's: one less than 500
    expect(page.get_by_text("Too long: what is above is no longer sent.")).to_have_count(1)


def test_too_long_a_message(page, server):
    server.replies = [Refusal(400, {"error": {"message": "8000 characters is the most"}})]
    box(page).fill("\U0001f338" * 7200)
    expect(page.locator("#count")).to_have_text("")
    box(page).fill("\U0001f338" * 7999)
    expect(page.locator("#count:not(.error)")).to_have_text("7,999 of 8,000 characters")
    box(page).fill("word " * 1999 + "word")
    expect(page.locator("#count.error")).to_have_text("9,999 of 8,000 characters")
    box(page).press("Enter")
    expect(page.locator("#notice span")).to_have_text("8000 characters is the most")
    expect(box(page)).to_have_value("word " * 1999 + "word")


# ---- What is kept


def test_reload_keeps_conversations_and_drafts(page, server):
    server.replies = [[*tokens("See "), {"tool": {"expression": "2+3", "result": "5"}}]]
    exchange(page, "first")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    box(page).fill("unfinished")
    page.reload()
    expect(answers(page)).to_have_text("Fine.")
    expect(box(page)).to_have_value("unfinished")
    chat_button(page, "first").click()
    expect(answers(page)).to_have_text("See 2+3 = 5")


def test_reload_in_the_middle_of_an_answer(page, server):
    server.replies = [[*tokens("Half"), WAIT], [WAIT]]
    say(page, "first")
    expect(answers(page)).to_have_text("Half")
    page.reload()
    expect(answers(page)).to_have_text("Half")
    say(page, "second")  # of which nothing comes
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.reload()
    expect(answers(page)).to_have_text(["Half"])
    expect(box(page)).to_have_value("second")


def test_an_answer_goes_on_while_another_conversation_is_open(page, server):
    server.replies = [[*tokens("Slow"), WAIT, *tokens(" but sure")], tokens("Quick")]
    say(page, "first")
    expect(answers(page)).to_have_text("Slow")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    expect(answers(page)).to_have_text("Quick")
    server.go_on()
    chat_button(page, "first").click()
    expect(answers(page)).to_have_text("Slow but sure")


def test_rename_delete_undo(page):
    exchange(page, "first")
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("Flowers")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Flowers")
    page.get_by_role("button", name="Delete").click()
    expect(chat_button(page, "Flowers")).to_have_count(0)
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_text("Fine.")
    page.get_by_role("button", name="Delete").click()
    page.reload()
    expect(page.locator("#chats li")).to_have_count(0)


def test_corrupt_storage_is_passed_over(page):
    exchange(page, "good")
    broken = {
        "iberis:chat:1": "{oops",
        "iberis:chat:2": "null",
        "iberis:chat:3": json.dumps({"id": "3", "messages": [{"role": "user"}]}),
        "iberis:settings": '{"top_k": 9999, "temperature": "hot", "seed": []}',
        "iberis:theme": "7",
    }
    page.evaluate("(broken) => Object.assign(localStorage, broken)", broken)
    page.reload()
    expect(answers(page)).to_have_text("Fine.")
    expect(page.locator("#chats li")).to_have_count(1)
    exchange(page, "still works", 1)


def test_full_storage_is_said(page):
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full') } }")
    exchange(page, "Hello")
    expect(page.locator("#notice")).to_contain_text("storage is full")


@pytest.mark.parametrize("storage", ["localStorage", "sessionStorage"])
def test_forbidden_storage(open_page, storage):
    """Browsers that block the data of sites throw as soon as the page looks at it."""
    page = open_page(f"Object.defineProperty(window, '{storage}', {{ get() {{ throw new Error('no') }} }})")
    exchange(page, "Hello")
    exchange(page, "Again", 1)
    expect(page.locator("#chats li")).to_have_count(1)


def test_two_tabs_see_each_other(page, server):
    exchange(page, "first")
    other = page.context.new_page()
    other.goto(server.url)
    chat_button(other, "first").click()
    exchange(other, "more", 1)
    expect(answers(page)).to_have_count(2)
    server.replies = [[*tokens("Slow"), WAIT, *tokens(" but sure")]]
    say(page, "and more")
    expect(answers(page).last).to_have_text("Slow")
    other.get_by_role("button", name="Rename").click()
    other.keyboard.type("Flowers")
    other.keyboard.press("Enter")
    server.go_on()
    expect(answers(page)).to_have_text(["Fine.", "Fine.", "Slow but sure"])  # an answer on its way stays
    expect(answers(other)).to_have_count(3)


# ---- Settings


def test_settings_reach_the_request_and_last(page, server):
    """Only what the reader chose is sent: for the rest the server's own settings hold."""
    exchange(page, "before")
    page.get_by_role("button", name="Sampling settings").click()
    page.get_by_label("Temperature").fill("0.3")
    expect(page.get_by_text("0.30")).to_be_visible()
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Longest answer").fill("99")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Top-k").fill("777")  # not allowed: the last allowed value stays
    page.keyboard.press("Escape")
    page.reload()
    exchange(page, "after", 1)
    page.get_by_role("button", name="Sampling settings").click()
    expect(page.get_by_label("Top-k")).to_have_value("7")
    page.get_by_label("Seed").fill("")
    page.get_by_role("button", name="Close").click()
    exchange(page, "any seed", 2)
    page.get_by_role("button", name="Sampling settings").click()
    page.get_by_role("button", name="Defaults").click()
    page.get_by_role("button", name="Close").click()
    exchange(page, "again", 3)
    for request in server.requests:
        del request["messages"]
    chosen = {"temperature": 0.3, "top_k": 7, "top_p": 0.9, "max_tokens": 99}
    assert server.requests == [{}, {**chosen, "seed": 42}, chosen, {}]


def test_settings_start_from_those_of_the_server(open_page, server):
    server.stats |= {"temperature": 0.62, "top_k": 20, "max_tokens": 300}
    page = open_page()
    expect(page.locator("#status")).to_contain_text("d20-sft")
    page.get_by_role("button", name="Sampling settings").click()
    for name, value in {"Temperature": "0.62", "Top-k": "20", "Top-p": "1", "Longest answer": "300"}.items():
        expect(page.get_by_label(name)).to_have_value(value)
    page.get_by_label("Top-k").fill("33")
    page.reload()
    expect(page.locator("#status")).to_contain_text("d20-sft")
    page.get_by_role("button", name="Sampling settings").click()
    expect(page.get_by_label("Top-k")).to_have_value("33")


def test_status_line(open_page, server):
    server.stats |= {"running": 2, "waiting": 1}
    expect(open_page().locator("#status")).to_have_text("d20-sft \u00b7 2 answering \u00b7 1 waiting")


# ---- What answers look like


def test_calls_of_the_calculator_are_chips(page, server):
    call = {"tool": {"expression": "12*7", "result": "84"}}
    answer = ask(page, server, [*tokens("So **it is "), call, *tokens("**.")])
    expect(answer.locator("strong .chip")).to_have_text("12*7 = 84")


def test_a_call_that_the_calculator_refused(page, server):
    answer = ask(page, server, [{"tool": {"expression": "1/0", "result": None}}])
    expect(answer.locator(".chip")).to_have_text("1/0 = ?")
    page.reload()
    expect(answer.locator(".chip")).to_have_text("1/0 = ?")


def test_text_cannot_pose_as_a_call(page, server):
    answer = ask(page, server, [{"tool": {"expression": "1+1", "result": "2"}}, *tokens(" \ue000 \ue001")])
    expect(answer.locator(".chip")).to_have_count(1)
    expect(answer).to_have_text("1+1 = 2 \ufffd \ufffd")


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


def test_markdown(page, server):
    answer = ask(page, server, tokens(*re.findall(r"[\s\S]{1,7}", MARKDOWN)))
    expect(answer.locator("h3")).to_have_text("Title")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("em")).to_have_text(["slanted", "slanted too"])
    expect(answer.locator("p code")).to_have_text("code *x*")
    expect(answer.locator("p").first).to_contain_text("2*3*4, __init__, snake_case_name.")
    expect(answer.locator("ul ul > li")).to_have_text("deeper")
    expect(answer.locator("ol > li")).to_have_text(["first", "second"])
    expect(answer.locator("ul").last).to_have_text("star")
    expect(answer.locator("pre")).to_have_text('if x < 1:\n    print("**no**")')
    link = answer.get_by_role("link", name="site")
    expect(link).to_have_attribute("href", "https://example.org/a_(b)")
    expect(link).to_have_attribute("rel", re.compile("noopener"))


def test_code_is_copied(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = ask(page, server, tokens("```\nx = 1\n", "y = 2\n```\nDone."))
    answer.get_by_role("button", name="Copy").click()
    expect(page.locator("#live")).to_have_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == "x = 1\ny = 2"


def test_code_is_copied_where_the_page_is_not_secure(page, server):
    """Over plain http from another machine there is no navigator.clipboard."""
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("() => addEventListener('copy', () => { window.copied = String(getSelection()) })")
    answer = ask(page, server, tokens("```\nx = 1\n```"))
    answer.get_by_role("button", name="Copy").click()
    expect(page.locator("#live")).to_have_text("Copied")
    assert page.evaluate("() => window.copied") == "x = 1"


HOSTILE = """<img src=x onerror="window.owned = 1"> <script>window.owned = 1</script>

# <b>head</b>
- <iframe src="javascript:top.owned = 1"></iframe>

[click](javascript:owned=1) [data](data:text/html,x) [quote](https://x" onclick="y)
`<i>` **<u>x</u>**
```html" onload="x
<script>window.owned = 1</script>
```"""


def test_hostile_text_stays_text(page, server):
    call = {"tool": {"expression": "<img src=x onerror='owned=1'>", "result": "<b>"}}
    server.replies = [[*tokens(*HOSTILE.splitlines(keepends=True)), call]]
    exchange(page, HOSTILE)  # its first line is the title
    expect(page.locator("h1")).to_contain_text("<img src=x")
    for place in (answers(page), page.locator("article.user"), page.locator("#chats"), page.locator("h1")):
        expect(place.locator("img, script, iframe, b, i, u, [onclick], [onload], [onerror]")).to_have_count(0)
    expect(answers(page).locator("a")).to_have_count(0)
    expect(answers(page)).to_contain_text("<img src=x onerror=")
    expect(answers(page)).to_contain_text("[click](javascript:owned=1)")
    expect(page.locator("article.user .text")).to_have_text(HOSTILE, use_inner_text=True)
    server.replies = [Refusal(400, {"error": {"message": HOSTILE}})]
    say(page, "again")
    expect(page.locator("#notice span")).to_contain_text("<img src=x")
    page.locator("#chats li").first.hover()
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#notice span")).to_contain_text("<img src=x")
    expect(page.locator("#notice img")).to_have_count(0)
    assert page.evaluate("() => window.owned") is None


def test_hostile_storage_stays_text(page):
    key, value = next(iter(stored_chat("<b>", 2).items()))
    chat = json.loads(value)
    chat["title"] = chat["draft"] = HOSTILE
    chat["messages"][1]["tools"] = [{"expression": HOSTILE, "result": HOSTILE}]
    chat["messages"][1]["content"] = "\ue000 [x](javascript:owned=1)"
    page.evaluate("([key, value]) => localStorage.setItem(key, value)", [key, json.dumps(chat)])
    page.reload()
    page.locator("#chats .title").click()
    expect(answers(page).locator(".chip")).to_contain_text("<img")
    expect(page.locator("#thread, #chats, h1").locator("a, img, b, iframe, script")).to_have_count(0)
    assert page.evaluate("() => window.owned") is None


def test_browser_refuses_html_even_from_the_page_itself(browser, server):
    """The policy is the second wall: HTML sinks throw, no other origin is in reach."""
    page = browser.new_page()
    page.goto(server.url)
    attempts = {
        "() => { try { document.body.innerHTML = '<b>' } catch (error) { return error.name } }": "TypeError",
        """() => {
          const image = document.createElement("img");
          try { image.setAttribute("onerror", "1") } catch (error) { return error.name }
        }""": "TypeError",
    }
    for attempt, outcome in attempts.items():
        assert page.evaluate(attempt) == outcome
    for foreign, directive in {
        "fetch('http://localhost:1/').catch(() => {})": "connect-src",
        "new Image().src = 'http://localhost:1/'": "img-src",
    }.items():
        refused = f"""() => new Promise((resolve) => {{
          addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
          {foreign};
          setTimeout(resolve, 20000, "nobody");
        }})"""
        assert page.evaluate(refused) == directive
    page.close()
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(sinks, PAGE.read_text("utf-8").split("<script>")[1])


@pytest.mark.parametrize("text", ["*a " * 3000, "`" * 9000, "[" * 9000, "**" * 4500, "_a" * 4500])
def test_pathological_text_is_quick(page, server, text):
    server.replies = [tokens(text)]
    with at_most(2, page):
        exchange(page, "Go")


# ---- Hands, eyes and ears


SIZES = """() => [...document.querySelectorAll("button, input, textarea")].filter(
  (node) => node.checkVisibility({ visibilityProperty: true }) && !node.closest("[inert]")
    && (!document.querySelector("dialog[open]") || node.closest("dialog")))
  .map((node) => {
    const { left, right, width, height } = node.getBoundingClientRect();
    const name = node.ariaLabel || node.textContent.trim() || node.labels?.[0]?.textContent.trim();
    return { name, left, right, width, height };
  })"""


def check_controls(page):
    """Whatever can be touched has a name, is as large as a finger, and lies on the screen."""
    controls = page.evaluate(SIZES)
    width = page.viewport_size["width"]
    assert len(controls) >= 3
    for control in controls:
        assert control["name"], control
        assert min(control["width"], control["height"]) >= 40, control
        assert 0 <= control["left"] <= control["right"] <= width, control
    assert page.evaluate("() => document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_screens(open_page, server, width):
    page = open_page(viewport={"width": width, "height": 568}, has_touch=True, is_mobile=width < 1000)
    check_controls(page)
    server.replies = [tokens("```\n" + "wide " * 60 + "\n```\n" + "x" * 300 + "\n\n| " + "long_word_" * 20)]
    box(page).fill("long title " * 20 + "w" * 200)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    check_controls(page)
    scroller = page.locator("#scroller")
    assert scroller.evaluate("(node) => node.scrollWidth - node.clientWidth") == 0
    assert page.locator("main").bounding_box()["width"] >= min(width, 480)
    assert page.evaluate("() => parseFloat(getComputedStyle(box).fontSize)") >= 16  # else iOS zooms in
    page.get_by_role("button", name="Edit").last.click()
    check_controls(page)
    page.keyboard.press("Escape")
    if page.get_by_role("button", name="Show conversations").is_visible():
        page.get_by_role("button", name="Show conversations").click()
        expect(page.get_by_role("button", name="Hide conversations")).to_be_focused()
    check_controls(page)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_label("Conversations", exact=True)).to_be_visible(visible=width > 760)
    page.get_by_role("button", name="Sampling settings").click()
    check_controls(page)
    dialog = page.get_by_role("dialog").bounding_box()
    assert dialog["y"] >= 0
    assert dialog["y"] + dialog["height"] <= 568


def test_box_grows_and_shift_enter_is_a_new_line(page, server):
    height = box(page).bounding_box()["height"]
    box(page).press("a")
    for _ in range(3):
        box(page).press("Shift+Enter")
    assert box(page).bounding_box()["height"] > height + 40
    assert server.requests == []
    for _ in range(60):
        box(page).press("Shift+Enter")
    assert box(page).bounding_box()["height"] <= 0.41 * page.viewport_size["height"]


def test_enter_of_an_input_method_does_not_send(page, server):
    box(page).focus()
    keyboard = page.context.new_cdp_session(page)
    keyboard.send(
        "Input.imeSetComposition", {"text": "\u306b\u307b\u3093", "selectionStart": 3, "selectionEnd": 3}
    )
    box(page).press("Enter")  # while composing, as Chromium reports it
    box(page).evaluate(
        """(box) => {
          const enter = (more) =>
            box.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, ...more }));
          box.dispatchEvent(new CompositionEvent("compositionstart"));
          enter({ isComposing: true });
          box.dispatchEvent(new CompositionEvent("compositionend"));
          enter({ keyCode: 229 });  // Safari, after the composition has ended
        }"""
    )
    keyboard.send("Input.insertText", {"text": "\u65e5\u672c"})
    expect(box(page)).to_have_value(re.compile("\u65e5\u672c"))
    assert server.requests == []
    box(page).press("Enter")
    expect(answers(page)).to_have_text("Fine.")


def test_keyboard_only(page, server):
    """Every control can be reached by Tab, in the order of the page, and shows that it has the focus."""
    expect(box(page)).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    page.get_by_text("Saint Iberis").first.click()  # Tab goes on from there
    seen = []
    while "Send" not in seen and len(seen) < 30:
        page.keyboard.press("Tab")
        name, is_marked = page.evaluate(
            """() => {
              const node = document.activeElement;
              const style = getComputedStyle(node.id === "box" ? node.form : node);
              const isMarked = style.outlineStyle !== "none" || style.boxShadow !== "none";
              return [node.ariaLabel ?? node.textContent.trim(), isMarked];
            }"""
        )
        assert is_marked, name
        seen.append(name)
    assert seen == [
        *("Hide conversations", "New chat", "Hello", "Rename", "Delete"),
        *("Dark or light", "Sampling settings"),
        *("Messages", "Edit", "Copy", "Regenerate", "Copy"),
        *("Message", "Send"),
    ]


def test_view_follows_until_the_reader_scrolls_up(page, server):
    lines = tokens(*(f"line {i}\n\n" for i in range(60)))
    server.replies = [[*lines, WAIT, *lines, WAIT, *lines]]
    say(page, "Go")
    expect(answers(page).get_by_text("line 59")).to_be_in_viewport()
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -400)
    expect(page.get_by_role("button", name="To the latest message")).to_be_visible()
    top = page.locator("#scroller").evaluate("(node) => node.scrollTop")
    server.go_on()
    expect(answers(page).get_by_text("line 59")).to_have_count(2)
    assert abs(page.locator("#scroller").evaluate("(node) => node.scrollTop") - top) < 2
    page.get_by_role("button", name="To the latest message").click()
    server.go_on()
    expect(answers(page).get_by_text("line 59")).to_have_count(3)
    expect(answers(page).get_by_text("line 59").last).to_be_in_viewport()
    finish(page)


def luminance(page):
    color = page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


def test_dark_and_light(open_page):
    page = open_page(color_scheme="light")
    assert luminance(page) > 200
    page.emulate_media(color_scheme="dark")
    assert luminance(page) < 50
    page.get_by_role("button", name="Dark or light").click()
    assert luminance(page) > 200
    page.reload()
    assert luminance(page) > 200


# Contrast by WCAG 2.2 of every text in sight against what is painted behind it, as [ratio, text]
CONTRAST = r"""() => {
  const rgba = (css) => {
    const [r, g, b, a = 1] = css.match(/[\d.]+/g).map(Number);
    return { rgb: css.startsWith("color(") ? [r, g, b] : [r / 255, g / 255, b / 255], a };
  };
  const over = (top, alpha, under) => top.map((c, i) => alpha * c + (1 - alpha) * under[i]);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const ratio = (a, b) => Math.max(luminance(a), luminance(b)) / Math.min(luminance(a), luminance(b));
  const paper = (node) => {
    const { rgb, a } = rgba(getComputedStyle(node).backgroundColor);
    return a === 1 ? rgb : over(rgb, a, paper(node.parentElement)); // that of the root is opaque
  };
  const opacity = (node) => (node ? Number(getComputedStyle(node).opacity) * opacity(node.parentElement) : 1);
  const found = [];
  const scope = document.querySelector("dialog[open]") ?? document.body;
  for (const node of scope.querySelectorAll("*")) {
    const own = [...node.childNodes].filter((child) => child.nodeType === Node.TEXT_NODE);
    const text = node.placeholder || own.map((child) => child.data).join("").trim();
    const isSeen = node.checkVisibility() && !node.matches(".spoken, :disabled") && opacity(node) > 0;
    if (!text || !isSeen) continue;
    const style = getComputedStyle(node, node.placeholder && !node.value ? "::placeholder" : null);
    const behind = paper(node);
    found.push([ratio(over(rgba(style.color).rgb, opacity(node), behind), behind), text]);
  }
  for (const node of scope.querySelectorAll("form:not([method]), input:not([type='range'], [type='file'])")) {
    if (!node.checkVisibility()) continue;
    const edge = rgba(getComputedStyle(node).borderTopColor).rgb;
    found.push([1.5 * ratio(edge, paper(node.parentElement)), "edge of " + (node.name || node.id)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page, server, scheme):
    """WCAG AA: 4.5 to 1 wherever there is text, 3 to 1 for the edges of what can be written in."""
    page = open_page(color_scheme=scheme)
    seen = {}

    def look():
        seen.update({text: ratio for ratio, text in page.evaluate(CONTRAST)})

    look()
    call = {"tool": {"expression": "1+1", "result": "2"}}
    server.replies = [[*tokens(MARKDOWN), call], Refusal(500)]
    exchange(page, "Go")
    say(page, "Again")
    expect(page.locator("#notice")).to_be_visible()
    page.get_by_role("button", name="Edit").first.click()
    box(page).fill("word " * 2000)
    look()
    page.get_by_role("button", name="Sampling settings").click()
    look()
    assert len(seen) > 30, seen
    for known in (
        "Message",
        "Title",
        "1+1 = 2",
        "HTTP 500",
        "New chat",
        "python",
        "Temperature",
        "edge of seed",
    ):
        assert known in seen
    assert {text: ratio for text, ratio in seen.items() if ratio < 4.5} == {}


def test_reduced_motion(open_page, server):
    page = open_page(reduced_motion="reduce")
    server.replies = [[WAIT]]
    say(page, "Hello")
    assert page.locator(".waiting").evaluate("(node) => getComputedStyle(node).animationName") == "none"
    server.go_on()


def test_japanese(open_page, server):
    page = open_page(locale="ja-JP")
    expect(page.locator("html")).to_have_attribute("lang", "ja")
    page.get_by_label("\u30e1\u30c3\u30bb\u30fc\u30b8", exact=True).fill("Hello")
    page.get_by_role("button", name="\u9001\u4fe1").click()
    expect(answers(page)).to_have_text("Fine.")


def test_every_word_has_its_translation(open_page):
    page = open_page(locale="ja-JP")
    words = page.evaluate(
        """() => [...document.querySelectorAll("[data-words], [aria-label]")].map(
          (node) => node.getAttribute("aria-label") ?? node.textContent)"""
    )
    assert [text for text in words if text.isascii()] == ["Top-p"]
    script = page.content().split("<script>")[1]
    known = set(re.findall(r'"([^"]+)":\s+"', script.split("const JAPANESE")[1].split("};")[0]))
    assert set(re.findall(r'\bt\("([^"]+)"', script)) <= known
    assert set(re.findall(r'toolButton\("\w+", "([^"]+)"', script)) <= known
