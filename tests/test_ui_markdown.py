"""The chat page: rendering of answers, and safety against hostile text."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.helpers.chat_page import MARKDOWN, answers, ask, at_most, exchange, say, stored_chat
from tests.helpers.fake_chat_server import PAGE, Refusal, tokens

pytest_plugins = "tests.helpers.chat_browser"


def test_calls_of_the_calculator_are_chips(page, chat_server):
    call = {"tool": {"expression": "12*7", "result": "84"}}
    answer = ask(page, chat_server, [*tokens("So **it is "), call, *tokens("**.")])
    expect(answer.locator("strong .chip")).to_have_text("12*7 = 84")


def test_a_call_that_the_calculator_refused(page, chat_server):
    answer = ask(page, chat_server, [{"tool": {"expression": "1/0", "result": None}}])
    expect(answer.locator(".chip")).to_have_text("1/0 = ?")
    page.reload()
    expect(answer.locator(".chip")).to_have_text("1/0 = ?")


def test_text_cannot_imitate_a_call(page, chat_server):
    answer = ask(
        page, chat_server, [{"tool": {"expression": "1+1", "result": "2"}}, *tokens(" \ue000 \ue001")]
    )
    expect(answer.locator(".chip")).to_have_count(1)
    expect(answer).to_have_text("1+1 = 2 \ufffd \ufffd")


def test_markdown(page, chat_server):
    answer = ask(page, chat_server, tokens(*re.findall(r"[\s\S]{1,7}", MARKDOWN)))
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


def test_code_is_copied(page, chat_server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = ask(page, chat_server, tokens("```\nx = 1\n", "y = 2\n```\nDone."))
    answer.get_by_role("button", name="Copy").click()
    expect(page.locator("#live")).to_have_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == "x = 1\ny = 2"


def test_code_is_copied_from_an_insecure_page(page, chat_server):
    """navigator.clipboard does not exist over plain http from another machine."""
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("() => addEventListener('copy', () => { window.copied = String(getSelection()) })")
    answer = ask(page, chat_server, tokens("```\nx = 1\n```"))
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


def test_hostile_text_stays_text(page, chat_server):
    call = {"tool": {"expression": "<img src=x onerror='owned=1'>", "result": "<b>"}}
    chat_server.replies = [[*tokens(*HOSTILE.splitlines(keepends=True)), call]]
    exchange(page, HOSTILE)  # its first line is the title
    expect(page.locator("h1")).to_contain_text("<img src=x")
    for place in (answers(page), page.locator("article.user"), page.locator("#chats"), page.locator("h1")):
        expect(place.locator("img, script, iframe, b, i, u, [onclick], [onload], [onerror]")).to_have_count(0)
    expect(answers(page).locator("a")).to_have_count(0)
    expect(answers(page)).to_contain_text("<img src=x onerror=")
    expect(answers(page)).to_contain_text("[click](javascript:owned=1)")
    expect(page.locator("article.user .text")).to_have_text(HOSTILE, use_inner_text=True)
    chat_server.replies = [Refusal(400, {"error": {"message": HOSTILE}})]
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


def test_browser_refuses_html_even_from_the_page_itself(browser, chat_server):
    """The policy is the second line of defence: HTML sinks throw, other origins are unreachable."""
    page = browser.new_page()
    page.goto(chat_server.url)
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
          setTimeout(resolve, 20000, "not refused");
        }})"""
        assert page.evaluate(refused) == directive
    page.close()
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    assert not re.search(sinks, PAGE.read_text("utf-8").split("<script>")[1])


@pytest.mark.parametrize("text", ["*a " * 3000, "`" * 9000, "[" * 9000, "**" * 4500, "_a" * 4500])
def test_pathological_text_is_fast(page, chat_server, text):
    chat_server.replies = [tokens(text)]
    with at_most(2, page):
        exchange(page, "Go")


@pytest.mark.parametrize(
    "line", ["# a" + " " * 8000 + "b", "# a" + " #" * 4000 + "b", "``` " + " " * 8000 + "`", "~" * 8000 + "`"]
)
def test_pathological_lines_are_fast(page, line):
    """Each frame of an answer parses all its lines; some of these took 100 ms."""
    with at_most(1, page):
        page.evaluate("(line) => { for (let i = 0; i < 40; i++) blocksOf(line) }", line)


def test_headings(page, chat_server):
    answer = ask(page, chat_server, tokens("# One #\n## Two ##  \n### About C#\n#no"))
    expect(answer.locator("h3")).to_have_text("One")
    expect(answer.locator("h4")).to_have_text("Two")
    expect(answer.locator("h5")).to_have_text("About C#")
    expect(answer.locator("p")).to_have_text("#no")
