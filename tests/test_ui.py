"""The chat page in a real browser: requests, answers, errors and settings."""

import pytest
from playwright.sync_api import expect

from tests.helpers.chat_page import (
    PATIENCE_S,
    answers,
    ask,
    at_most,
    box,
    chat_button,
    exchange,
    finish,
    say,
    sent,
    stored_chat,
)
from tests.helpers.fake_chat_server import HANG_UP, WAIT, FakeChatServer, Refusal, tokens

pytest_plugins = "tests.helpers.chat_browser"


# ---- Requests


def test_text_appears_before_the_answer_ends(page, chat_server):
    chat_server.replies = [[*tokens("One ", "two"), WAIT, *tokens(" three")]]
    say(page, "Count")
    expect(answers(page)).to_have_text("One two")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator("#live")).to_have_text("")  # nothing is announced before the end
    chat_server.resume()
    expect(answers(page)).to_have_text("One two three")
    finish(page)
    expect(page.locator("#live")).to_have_text("Answer: One two three")
    assert sent(chat_server) == [("user", "Count")]


def test_events_may_be_split_anywhere(page, chat_server):
    """Network reads can end in the middle of a line or a character."""
    line = 'data: {"token": "na\u00efve \U0001f338"}\r\n\r\n'.encode()
    reply = [b": a comment\n\n", *(line[i : i + 1] for i in range(len(line))), b'data: {"done": true}\n\n']
    expect(ask(page, chat_server, [*reply, {"done": True}])).to_have_text("na\u00efve \U0001f338")


def test_history_is_sent_without_the_calls(page, chat_server):
    call = {"tool": {"expression": "12*7", "result": "84"}}
    chat_server.replies = [[*tokens("It is "), call, *tokens("84.")]]
    exchange(page, "What is 12*7?")
    exchange(page, "Sure?", 1)
    assert sent(chat_server) == [("user", "What is 12*7?"), ("assistant", "It is 84."), ("user", "Sure?")]


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_the_partial_answer(page, chat_server, how):
    chat_server.replies = [[*tokens("Once upon"), WAIT]]
    say(page, "Tell a story")
    expect(answers(page)).to_have_text("Once upon")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    finish(page)
    assert chat_server.client_left.wait(PATIENCE_S)  # the server can stop, too
    expect(answers(page)).to_have_text("Once upon")
    page.reload()
    expect(answers(page)).to_have_text("Once upon")


def test_stop_before_the_answer_restores_the_text(page, chat_server):
    chat_server.replies = [[WAIT]]
    say(page, "Wait")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(box(page)).to_have_value("Wait")
    expect(page.locator("article")).to_have_count(0)


def test_regenerate_replaces_the_last_answer(page, chat_server):
    chat_server.replies = [tokens("First."), tokens("Second.")]
    exchange(page, "Say it")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text(["Second."])
    assert sent(chat_server, 0) == sent(chat_server, 1) == [("user", "Say it")]


def test_failed_regenerate_keeps_the_old_answer(page, chat_server):
    chat_server.replies = [tokens("First."), Refusal(500)]
    exchange(page, "Say it")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("#notice")).to_contain_text("HTTP 500")
    expect(answers(page)).to_have_text(["First."])
    expect(box(page)).to_have_value("")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text(["Fine."])


def test_edit_replaces_later_messages(page, chat_server):
    chat_server.replies = [tokens("A."), tokens("B."), tokens("C.")]
    exchange(page, "one")
    exchange(page, "two", 1)
    box(page).fill("a draft")
    page.get_by_role("button", name="Edit").first.click()
    expect(box(page)).to_have_value("one")
    expect(page.locator("article.cut")).to_have_count(3)
    say(page, "uno")
    expect(answers(page)).to_have_text(["C."])
    finish(page)
    assert sent(chat_server) == [("user", "uno")]
    expect(box(page)).to_have_value("a draft")


def test_escape_cancels_an_edit_and_restores_the_draft(page):
    exchange(page, "one")
    box(page).fill("a draft")
    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    expect(box(page)).to_have_value("a draft")
    expect(page.locator("#editing")).to_be_hidden()


def test_failed_edit_loses_nothing(page, chat_server):
    chat_server.replies = [tokens("A."), Refusal(500)]
    exchange(page, "one")
    page.get_by_role("button", name="Edit").click()
    say(page, "uno")
    expect(page.locator("#notice")).to_contain_text("HTTP 500")
    expect(box(page)).to_have_value("uno")
    expect(page.locator("article.user .text")).to_have_text("one")
    page.keyboard.press("Escape")
    expect(box(page)).to_have_value("")


def test_a_double_click_sends_and_does_not_stop(page, chat_server):
    """The second click hit the stop button of the started answer."""
    chat_server.replies = [[*tokens("Once"), WAIT]]
    box(page).fill("Hello")
    page.get_by_role("button", name="Send").dblclick()
    expect(answers(page)).to_have_text("Once")
    assert not chat_server.client_left.is_set()
    expect(box(page)).to_have_value("")


def test_an_example_keeps_the_draft(page, chat_server):
    """It was sent through the box, and replaced its text."""
    box(page).fill("a draft")
    page.get_by_role("button", name="Why is the sky blue?").click()
    expect(answers(page)).to_have_text("Fine.")
    expect(box(page)).to_have_value("a draft")
    assert sent(chat_server) == [("user", "Why is the sky blue?")]


def test_the_end_of_an_answer_keeps_selection_and_focus(page, chat_server):
    """The whole thread was rendered again: selection, focus and the scroll position of code were lost."""
    chat_server.replies = [
        tokens("```\n" + "wide " * 100 + "\n```\nRead me."),
        [*tokens("Slow"), WAIT, *tokens(" end")],
    ]
    exchange(page, "first")
    say(page, "second")
    expect(answers(page).last).to_have_text("Slow")
    page.locator("pre").evaluate("(pre) => (pre.scrollLeft = 50)")
    answers(page).first.locator("p").evaluate("(p) => getSelection().selectAllChildren(p)")
    copy = page.locator("article").nth(1).get_by_role("button", name="Copy").last
    copy.focus()
    chat_server.resume()
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    expect(answers(page).last).to_have_text("Slow end")
    expect(copy).to_be_focused()
    assert page.evaluate("() => String(getSelection())") == "Read me."
    assert page.locator("pre").evaluate("(pre) => pre.scrollLeft") == 50
    expect(page.get_by_role("button", name="Edit").first).to_be_enabled()
    expect(page.locator("#thread")).to_have_attribute("aria-busy", "false")


# ---- Errors


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
        ([b"data: {oops\n\n"], "The server sent a response that this page does not understand."),
        ([{"error": "the worker died"}], "the worker died"),
        ([{"error": {"message": "the model failed"}}], "the model failed"),
        ([], "The answer was empty."),
    ],
)
def test_errors_are_shown_and_keep_the_text(page, chat_server, reply, message):
    chat_server.replies = [reply]
    say(page, "Hello")
    expect(page.locator("#notice span")).to_have_text(message)
    expect(page.locator("#live")).to_have_text(message)
    expect(box(page)).to_have_value("Hello")
    expect(page.locator("article")).to_have_count(0)
    box(page).press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    expect(page.locator("#notice")).to_be_hidden()


def test_lost_connection_keeps_the_partial_answer(page, chat_server):
    chat_server.replies = [[*tokens("Half an"), WAIT, HANG_UP]]
    say(page, "Hello")
    expect(answers(page)).to_have_text("Half an")
    chat_server.resume()
    expect(page.locator("#notice span")).to_have_text(
        "The connection was lost before the answer was complete."
    )
    expect(answers(page)).to_have_text("Half an")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()


def test_no_server_at_all(open_page):
    with FakeChatServer() as chat_server:
        page = open_page()
        page.goto(chat_server.url)
    page.route("**/chat/completions", lambda route: route.abort("connectionrefused"))
    say(page, "Hello")
    expect(page.locator("#notice span")).to_have_text("No connection to the server.")
    expect(box(page)).to_have_value("Hello")


def test_key_is_requested_and_remembered(page, chat_server):
    chat_server.replies = [Refusal(401, {"error": {"message": "a key is needed"}})]
    say(page, "Hello")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    page.reload()
    exchange(page, "Again", 1)
    assert chat_server.keys == [None, "Bearer secret", "Bearer secret"]


def test_a_wrong_key_is_requested_again(page, chat_server):
    chat_server.replies = [Refusal(401), Refusal(401)]
    say(page, "Hello")
    expect(page.get_by_text("The server did not accept the last key.")).to_be_hidden()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server did not accept the last key.")).to_be_visible()
    page.get_by_label("API key").fill("right")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    assert chat_server.keys == [None, "Bearer wrong", "Bearer right"]


def test_a_key_that_is_invalid_in_a_header(page, chat_server):
    """After a key in full-width letters every fetch failed, and the key was never requested again."""
    chat_server.replies = [Refusal(401)]
    say(page, "Hello")
    key = page.get_by_label("API key")
    key.fill("\uff53\uff45\uff43\uff52\uff45\uff54")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    assert "ASCII" in key.evaluate("(key) => key.validationMessage")
    key.fill(" secret ")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    assert chat_server.keys == [None, "Bearer secret"]


def test_no_key_given(page, chat_server):
    chat_server.replies = [Refusal(401, {"error": {"message": "a key is needed"}})]
    say(page, "Hello")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#notice span")).to_have_text("a key is needed")
    expect(box(page)).to_have_value("Hello")


def test_requests_respect_the_servers_limits(page, chat_server):
    """32,000 characters in total, 8,000 per message: drop the oldest exchanges, split no character."""
    long_answer = "a" * 7999 + "\U0001f338" * 10
    chat_server.replies = [tokens(long_answer) for _ in range(5)]
    for i in range(5):
        exchange(page, f"Question {i}", i)
    exchange(page, "Last", 5)
    messages = chat_server.requests[-1]["messages"]
    assert sum(len(message["content"]) for message in messages) <= 32000
    asked = [message["content"] for message in messages[::2]]
    assert asked == ["Question 2", "Question 3", "Question 4", "Last"]
    assert messages[1]["content"] == "a" * 7999 + "\ufffd"
    note = page.get_by_text("Too long: the messages above are no longer sent.")
    expect(note.locator("xpath=following-sibling::article").first).to_contain_text("Question 2")


def test_messages_beyond_the_context_are_marked(open_page, chat_server):
    """The model's context is much shorter than the server's limit of characters; the page did not show it."""
    chat_server.stats |= {"context": 1024, "max_tokens": 512}  # leaves 512 tokens for the conversation
    chat_server.replies = [tokens("word " * 120) for _ in range(5)]
    page = open_page()
    note = page.get_by_text("The model may not see the messages above.")
    for i in range(5):
        exchange(page, f"Question {i}", i)
        expect(note).to_have_count(int(i > 2))
    page.reload()
    expect(note.locator("xpath=following-sibling::article").first).to_contain_text("Question 2")
    assert len(chat_server.requests[-1]["messages"]) == 9  # the server decides which messages to drop


def test_very_long_conversation(page, chat_server):
    page.evaluate("(chats) => Object.assign(localStorage, chats)", stored_chat("1", 600))
    page.reload()
    chat_button(page, "Long").click()
    expect(answers(page)).to_have_count(300)
    with at_most(3, page):
        exchange(page, "Last", 300)
    expect(answers(page).last).to_be_in_viewport()
    assert len(chat_server.requests[0]["messages"]) == 499  # the first must be the user's: one less than 500
    expect(page.get_by_text("Too long: the messages above are no longer sent.")).to_have_count(1)


def test_a_message_that_is_too_long(page, chat_server):
    chat_server.replies = [Refusal(400, {"error": {"message": "8000 characters is the most"}})]
    box(page).fill("\U0001f338" * 7200)
    expect(page.locator("#count")).to_have_text("")
    box(page).fill("\U0001f338" * 7999)
    expect(page.locator("#count:not(.error)")).to_have_text("7,999 of 8,000 characters")
    box(page).fill("word " * 1999 + "word")
    expect(page.locator("#count.error")).to_have_text("9,999 of 8,000 characters")
    box(page).press("Enter")
    expect(page.locator("#notice span")).to_have_text("8000 characters is the most")
    expect(box(page)).to_have_value("word " * 1999 + "word")


# ---- Settings


def test_settings_are_sent_and_stored(page, chat_server):
    """Only the user's choices are sent; the server's settings apply to the rest."""
    exchange(page, "before")
    page.get_by_role("button", name="Sampling settings").click()
    page.get_by_label("Temperature").fill("0.3")
    expect(page.get_by_text("0.30")).to_be_visible()
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Maximum answer length").fill("99")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Top-k").fill("777")  # invalid: the last valid value remains
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
    for request in chat_server.requests:
        del request["messages"]
    chosen = {"temperature": 0.3, "top_k": 7, "top_p": 0.9, "max_tokens": 99}
    assert chat_server.requests == [{}, {**chosen, "seed": 42}, chosen, {}]


def test_settings_default_to_the_servers(open_page, chat_server):
    chat_server.stats |= {"temperature": 0.62, "top_k": 20, "max_tokens": 300}
    page = open_page()
    expect(page.locator("#status")).to_contain_text("d20-sft")
    page.get_by_role("button", name="Sampling settings").click()
    shown = {"Temperature": "0.62", "Top-k": "20", "Top-p": "1", "Maximum answer length": "300"}
    for name, value in shown.items():
        expect(page.get_by_label(name)).to_have_value(value)
    page.get_by_label("Top-k").fill("33")
    page.reload()
    expect(page.locator("#status")).to_contain_text("d20-sft")
    page.get_by_role("button", name="Sampling settings").click()
    expect(page.get_by_label("Top-k")).to_have_value("33")


def test_status_line(open_page, chat_server):
    chat_server.stats |= {"running": 2, "waiting": 1}
    expect(open_page().locator("#status")).to_have_text("d20-sft \u00b7 2 answering \u00b7 1 waiting")
