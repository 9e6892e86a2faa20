"""The chat page in a real browser: what it asks, shows and keeps."""

import json
import re
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect

from tests.chat_page import MARKDOWN, PATIENCE_S, answers, ask, box, chat_button, exchange, finish, say, sent
from tests.fake_chat_server import HANG_UP, PAGE, WAIT, FakeChatServer, Refusal, tokens

pytest_plugins = "tests.chat_browser"


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


def test_a_double_click_sends_and_does_not_stop(page, server):
    """The second click found the answer under way, and ended it."""
    server.replies = [[*tokens("Once"), WAIT]]
    box(page).fill("Hello")
    page.get_by_role("button", name="Send").dblclick()
    expect(answers(page)).to_have_text("Once")
    assert not server.client_left.is_set()
    expect(box(page)).to_have_value("")


def test_an_example_leaves_the_draft(page, server):
    """It was asked through the box, in place of what stood there."""
    box(page).fill("a draft")
    page.get_by_role("button", name="Why is the sky blue?").click()
    expect(answers(page)).to_have_text("Fine.")
    expect(box(page)).to_have_value("a draft")
    assert sent(server) == [("user", "Why is the sky blue?")]


def test_the_end_of_an_answer_leaves_what_the_reader_holds(page, server):
    """The whole thread was drawn anew: selection, focus and the scrolling of code were lost."""
    server.replies = [
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
    server.go_on()
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    expect(answers(page).last).to_have_text("Slow end")
    expect(copy).to_be_focused()
    assert page.evaluate("() => String(getSelection())") == "Read me."
    assert page.locator("pre").evaluate("(pre) => pre.scrollLeft") == 50
    expect(page.get_by_role("button", name="Edit").first).to_be_enabled()
    expect(page.locator("#thread")).to_have_attribute("aria-busy", "false")


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


def test_a_key_that_no_header_can_carry(page, server):
    """With one in full width, fetch failed from then on, and the key was never asked for again."""
    server.replies = [Refusal(401)]
    say(page, "Hello")
    key = page.get_by_label("API key")
    key.fill("\uff53\uff45\uff43\uff52\uff45\uff54")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    assert "ASCII" in key.evaluate("(key) => key.validationMessage")
    key.fill(" secret ")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    assert server.keys == [None, "Bearer secret"]


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


def test_what_the_model_may_not_see_is_marked(open_page, server):
    """Its context ends far sooner than the characters that the server takes, and nothing said so."""
    server.stats |= {"context": 1024, "max_tokens": 512}  # 512 tokens are left for what was said
    server.replies = [tokens("word " * 120) for _ in range(5)]
    page = open_page()
    note = page.get_by_text("The model may no longer see what is above.")
    for i in range(5):
        exchange(page, f"Question {i}", i)
        expect(note).to_have_count(int(i > 2))
    page.reload()
    expect(note.locator("xpath=following-sibling::article").first).to_contain_text("Question 2")
    assert len(server.requests[-1]["messages"]) == 9  # what falls away is the server's choice


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


def test_a_click_elsewhere_ends_a_rename_and_counts(page):
    """The list was drawn anew between the press and the release: the click hit nothing."""
    exchange(page, "first")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    page.get_by_role("button", name="Rename").first.click()
    page.keyboard.type("Flowers")
    chat_button(page, "first").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("first")
    expect(chat_button(page, "Flowers")).to_be_visible()


def test_the_list_keeps_the_focus(page, server):
    """When an answer ended elsewhere, the list was drawn anew and the focus fell to the page."""
    server.replies = [[*tokens("Slow"), WAIT]]
    say(page, "first")
    expect(answers(page)).to_have_text("Slow")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    chat_button(page, "second").focus()
    server.go_on()
    expect(page.locator("#chats .title")).to_have_text(["first", "second"])
    expect(chat_button(page, "second")).to_be_focused()


def test_a_deleted_answer_is_silent(page, server):
    """What had come of it was read out in place of "Deleted"."""
    server.replies = [[*tokens("Half an"), WAIT]]
    say(page, "first")
    expect(answers(page)).to_have_text("Half an")
    page.evaluate(
        """() => {
          window.heard = [];
          const hear = () => live.textContent && heard.push(live.textContent);
          new MutationObserver(hear).observe(live, { childList: true });
        }"""
    )
    page.get_by_role("button", name="Delete").click()
    assert server.client_left.wait(PATIENCE_S)
    expect(page.locator("#live")).to_have_text("Deleted: first")
    page.wait_for_timeout(100)  # twice as long as an announcement waits
    assert page.evaluate("() => heard") == ["Deleted: first"]
    expect(page.get_by_role("button", name="Undo")).to_be_visible()


def test_a_failure_out_of_sight_says_where_and_leaves_undo(page, server):
    server.replies = [tokens("A."), [WAIT, {"error": "the worker died"}]]
    exchange(page, "first")
    page.get_by_role("button", name="New chat").click()
    say(page, "second")
    chat_button(page, "first").click()
    page.get_by_role("button", name="Delete").last.click()
    server.go_on()
    expect(page.locator("#notice span")).to_have_text("Deleted: first \u00b7 second: the worker died")
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_text("A.")


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
    for tab in (page, other):  # and so does the new name, which the end of the answer used to undo
        expect(chat_button(tab, "Flowers")).to_be_visible()


@pytest.fixture
def twins(page, server):
    """Two tabs with the same conversation open, as after duplicating one."""
    exchange(page, "first")
    other = page.context.new_page()
    other.goto(server.url)
    chat_button(other, "first").click()
    yield page, other
    other.close()


HIDE = "() => window.dispatchEvent(new Event('pagehide'))"  # whereupon a tab saves its draft


def test_two_tabs_with_drafts_leave_each_other_alone(twins):
    """Each took the other's save for news, and saved its own draft back, without end."""
    one, two = twins
    box(one).fill("draft one")
    box(two).fill("draft two")
    for page in twins:
        page.evaluate("() => { window.news = 0; window.addEventListener('storage', () => news++) }")
    one.get_by_role("button", name="Copy").first.focus()
    two.evaluate(HIDE)
    one.wait_for_function("() => news === 1")
    one.wait_for_timeout(100)
    assert [page.evaluate("() => news") for page in twins] == [1, 0]
    expect(one.get_by_role("button", name="Copy").first).to_be_focused()
    expect(box(one)).to_have_value("draft one")
    expect(box(two)).to_have_value("draft two")


def test_a_foreign_save_leaves_the_notice(twins):
    one, two = twins
    one.get_by_role("button", name="New chat").click()
    exchange(one, "second")
    one.get_by_role("button", name="Delete").first.click()
    expect(one.locator("#notice span")).to_have_text("Deleted: second")
    chat_button(one, "first").focus()
    two.get_by_role("button", name="Rename").click()
    two.keyboard.type("Flowers")
    two.keyboard.press("Enter")
    expect(chat_button(one, "Flowers")).to_be_focused()
    expect(one.get_by_role("button", name="Undo")).to_be_visible()


def test_deleted_in_the_other_tab(twins):
    one, two = twins
    box(one).fill("a draft")
    two.get_by_role("button", name="Delete").click()
    expect(one.locator("article")).to_have_count(0)
    expect(box(one)).to_have_value("a draft")


def test_a_rename_keeps_what_the_other_tab_has_said(twins):
    """It saved the conversation as it was when the rename began, which deleted it."""
    one, two = twins
    one.get_by_role("button", name="Rename").click()
    one.keyboard.type("Flowers")
    exchange(two, "more", 1)
    expect(answers(one)).to_have_count(2)
    one.keyboard.press("Enter")
    expect(chat_button(two, "Flowers")).to_be_visible()
    for page in twins:
        page.reload()
        expect(answers(page)).to_have_count(2)


def test_a_rename_of_what_the_other_tab_has_deleted(twins):
    one, two = twins
    one.get_by_role("button", name="Rename").click()
    one.keyboard.type("Flowers")
    two.get_by_role("button", name="Delete").click()
    expect(one.locator("article")).to_have_count(0)
    one.keyboard.press("Enter")
    expect(one.locator("#chats li")).to_have_count(0)
    one.reload()
    expect(one.locator("#chats li")).to_have_count(0)


def test_an_edit_keeps_what_the_other_tab_has_said(twins):
    """While a message was edited, the other's news was passed over, and then overwritten."""
    one, two = twins
    one.get_by_role("button", name="Edit").click()
    box(one).fill("uno")
    exchange(two, "more", 1)
    expect(answers(one)).to_have_count(2)
    expect(box(one)).to_have_value("uno")
    expect(one.locator("article.cut")).to_have_count(3)
    one.evaluate(HIDE)
    one.reload()
    expect(answers(one)).to_have_count(2)


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


@pytest.mark.parametrize(
    "line", ["# a" + " " * 8000 + "b", "# a" + " #" * 4000 + "b", "``` " + " " * 8000 + "`", "~" * 8000 + "`"]
)
def test_pathological_lines_are_quick(page, line):
    """Each frame of an answer reads all its lines; some of these took 100 ms."""
    with at_most(1, page):
        page.evaluate("(line) => { for (let i = 0; i < 40; i++) blocksOf(line) }", line)


def test_headings(page, server):
    answer = ask(page, server, tokens("# One #\n## Two ##  \n### About C#\n#no"))
    expect(answer.locator("h3")).to_have_text("One")
    expect(answer.locator("h4")).to_have_text("Two")
    expect(answer.locator("h5")).to_have_text("About C#")
    expect(answer.locator("p")).to_have_text("#no")
