"""The chat page: storage of conversations in the browser, and two tabs that share it."""

import json

import pytest
from playwright.sync_api import expect

from tests.helpers.chat_page import PATIENCE_S, answers, box, chat_button, exchange, say
from tests.helpers.fake_chat_server import WAIT, tokens

pytest_plugins = "tests.helpers.chat_browser"


def test_reload_keeps_conversations_and_drafts(page, chat_server):
    chat_server.replies = [[*tokens("See "), {"tool": {"expression": "2+3", "result": "5"}}]]
    exchange(page, "first")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    box(page).fill("unfinished")
    page.reload()
    expect(answers(page)).to_have_text("Fine.")
    expect(box(page)).to_have_value("unfinished")
    chat_button(page, "first").click()
    expect(answers(page)).to_have_text("See 2+3 = 5")


def test_reload_in_the_middle_of_an_answer(page, chat_server):
    chat_server.replies = [[*tokens("Half"), WAIT], [WAIT]]
    say(page, "first")
    expect(answers(page)).to_have_text("Half")
    page.reload()
    expect(answers(page)).to_have_text("Half")
    say(page, "second")  # nothing of this answer arrives
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.reload()
    expect(answers(page)).to_have_text(["Half"])
    expect(box(page)).to_have_value("second")


def test_an_answer_continues_while_another_conversation_is_open(page, chat_server):
    chat_server.replies = [[*tokens("Slow"), WAIT, *tokens(" but sure")], tokens("Quick")]
    say(page, "first")
    expect(answers(page)).to_have_text("Slow")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    expect(answers(page)).to_have_text("Quick")
    chat_server.resume()
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


def test_a_click_elsewhere_ends_a_rename_and_takes_effect(page):
    """The list was rendered again between press and release: the click hit nothing."""
    exchange(page, "first")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    page.get_by_role("button", name="Rename").first.click()
    page.keyboard.type("Flowers")
    chat_button(page, "first").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("first")
    expect(chat_button(page, "Flowers")).to_be_visible()


def test_the_list_keeps_the_focus(page, chat_server):
    """When an answer ended elsewhere, the list was rendered again and lost the focus."""
    chat_server.replies = [[*tokens("Slow"), WAIT]]
    say(page, "first")
    expect(answers(page)).to_have_text("Slow")
    page.get_by_role("button", name="New chat").click()
    exchange(page, "second")
    chat_button(page, "second").focus()
    chat_server.resume()
    expect(page.locator("#chats .title")).to_have_text(["first", "second"])
    expect(chat_button(page, "second")).to_be_focused()


def test_a_deleted_answer_is_not_announced(page, chat_server):
    """The partial answer was announced instead of "Deleted"."""
    chat_server.replies = [[*tokens("Half an"), WAIT]]
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
    assert chat_server.client_left.wait(PATIENCE_S)
    expect(page.locator("#live")).to_have_text("Deleted: first")
    page.wait_for_timeout(100)  # twice as long as an announcement waits
    assert page.evaluate("() => heard") == ["Deleted: first"]
    expect(page.get_by_role("button", name="Undo")).to_be_visible()


def test_a_failure_elsewhere_names_the_conversation_and_keeps_undo(page, chat_server):
    chat_server.replies = [tokens("A."), [WAIT, {"error": "the worker died"}]]
    exchange(page, "first")
    page.get_by_role("button", name="New chat").click()
    say(page, "second")
    chat_button(page, "first").click()
    page.get_by_role("button", name="Delete").last.click()
    chat_server.resume()
    expect(page.locator("#notice span")).to_have_text("Deleted: first \u00b7 second: the worker died")
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_text("A.")


def test_corrupt_storage_is_ignored(page):
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


def test_full_storage_is_reported(page):
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full') } }")
    exchange(page, "Hello")
    expect(page.locator("#notice")).to_contain_text("storage is full")


@pytest.mark.parametrize("storage", ["localStorage", "sessionStorage"])
def test_forbidden_storage(open_page, storage):
    """Browsers that block site data throw on any access to storage."""
    page = open_page(f"Object.defineProperty(window, '{storage}', {{ get() {{ throw new Error('no') }} }})")
    exchange(page, "Hello")
    exchange(page, "Again", 1)
    expect(page.locator("#chats li")).to_have_count(1)


def test_two_tabs_see_each_other(page, chat_server):
    exchange(page, "first")
    other = page.context.new_page()
    other.goto(chat_server.url)
    chat_button(other, "first").click()
    exchange(other, "more", 1)
    expect(answers(page)).to_have_count(2)
    chat_server.replies = [[*tokens("Slow"), WAIT, *tokens(" but sure")]]
    say(page, "and more")
    expect(answers(page).last).to_have_text("Slow")
    other.get_by_role("button", name="Rename").click()
    other.keyboard.type("Flowers")
    other.keyboard.press("Enter")
    chat_server.resume()
    expect(answers(page)).to_have_text(["Fine.", "Fine.", "Slow but sure"])  # an answer in progress is kept
    expect(answers(other)).to_have_count(3)
    for tab in (page, other):  # so is the new name, which the end of the answer used to undo
        expect(chat_button(tab, "Flowers")).to_be_visible()


@pytest.fixture
def twins(page, chat_server):
    """Two tabs showing the same conversation, as after duplicating a tab."""
    exchange(page, "first")
    other = page.context.new_page()
    other.goto(chat_server.url)
    chat_button(other, "first").click()
    yield page, other
    other.close()


HIDE = "() => window.dispatchEvent(new Event('pagehide'))"  # a tab then saves its draft


def test_two_tabs_with_drafts_do_not_respond_to_each_other(twins):
    """Each answered the other's save by saving its own draft, endlessly."""
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


def test_a_save_by_another_tab_keeps_the_notice(twins):
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


def test_a_rename_keeps_the_other_tabs_messages(twins):
    """It saved the conversation as of the start of the rename, which deleted newer messages."""
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


def test_a_rename_of_a_conversation_deleted_in_the_other_tab(twins):
    one, two = twins
    one.get_by_role("button", name="Rename").click()
    one.keyboard.type("Flowers")
    two.get_by_role("button", name="Delete").click()
    expect(one.locator("article")).to_have_count(0)
    one.keyboard.press("Enter")
    expect(one.locator("#chats li")).to_have_count(0)
    one.reload()
    expect(one.locator("#chats li")).to_have_count(0)


def test_an_edit_keeps_the_other_tabs_messages(twins):
    """During an edit the other tab's changes were ignored, and then overwritten."""
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
