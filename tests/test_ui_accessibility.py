"""Accessibility of the chat page: screen sizes, keyboards, contrast, languages."""

import re

import pytest
from playwright.sync_api import expect

from tests.helpers.chat_page import MARKDOWN, answers, box, exchange, finish, say
from tests.helpers.fake_chat_server import WAIT, Refusal, tokens

pytest_plugins = "tests.helpers.chat_browser"


SIZES = """() => [...document.querySelectorAll("button, input, textarea")].filter(
  (node) => node.checkVisibility({ visibilityProperty: true }) && !node.closest("[inert]")
    && (!document.querySelector("dialog[open]") || node.closest("dialog")))
  .map((node) => {
    const { left, right, width, height } = node.getBoundingClientRect();
    const name = node.ariaLabel || node.textContent.trim() || node.labels?.[0]?.textContent.trim();
    return { name, left, right, width, height };
  })"""


def check_controls(page):
    """Check that every control has a name, is large enough to touch, and is within the screen."""
    controls = page.evaluate(SIZES)
    width = page.viewport_size["width"]
    assert len(controls) >= 3
    for control in controls:
        assert control["name"], control
        assert min(control["width"], control["height"]) >= 40, control
        assert 0 <= control["left"] <= control["right"] <= width, control
    assert page.evaluate("() => document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_screens(open_page, chat_server, width):
    page = open_page(viewport={"width": width, "height": 568}, has_touch=True, is_mobile=width < 1000)
    check_controls(page)
    chat_server.replies = [
        tokens("```\n" + "wide " * 60 + "\n```\n" + "x" * 300 + "\n\n| " + "long_word_" * 20)
    ]
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


def test_box_grows_and_shift_enter_inserts_a_line(page, chat_server):
    height = box(page).bounding_box()["height"]
    box(page).press("a")
    for _ in range(3):
        box(page).press("Shift+Enter")
    assert box(page).bounding_box()["height"] > height + 40
    assert chat_server.requests == []
    for _ in range(60):
        box(page).press("Shift+Enter")
    assert box(page).bounding_box()["height"] <= 0.41 * page.viewport_size["height"]


def test_enter_of_an_input_method_does_not_send(page, chat_server):
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
    assert chat_server.requests == []
    box(page).press("Enter")
    expect(answers(page)).to_have_text("Fine.")


# Chromium reports isComposing; Safari, after the composition has ended, only key code 229
ESCAPES = """(node) => {
  const escape = (more) =>
    node.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true, ...more }));
  escape({ isComposing: true });
  escape({ keyCode: 229 });
}"""


def test_escape_of_an_input_method_stops_nothing(page, chat_server):
    """The Escape that cancels a conversion also stopped the answer, the edit or the rename."""
    chat_server.replies = [[*tokens("Slow"), WAIT]]
    say(page, "Hello")
    expect(answers(page)).to_have_text("Slow")
    box(page).evaluate(ESCAPES)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    chat_server.resume()
    finish(page)
    page.get_by_role("button", name="Edit").click()
    box(page).evaluate(ESCAPES)
    expect(page.locator("#editing")).to_be_visible()
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("Flowers")
    page.get_by_role("textbox", name="Rename").evaluate(ESCAPES)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Flowers")


def test_keyboard_only(page, chat_server):
    """Tab reaches every control in the order of the page, and each shows that it has the focus."""
    expect(box(page)).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Regenerate")).to_be_enabled()
    page.get_by_text("Saint Iberis").first.click()  # Tab continues from here
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


def test_view_follows_until_the_user_scrolls_up(page, chat_server):
    lines = tokens(*(f"line {i}\n\n" for i in range(60)))
    chat_server.replies = [[*lines, WAIT, *lines, WAIT, *lines]]
    say(page, "Go")
    expect(answers(page).get_by_text("line 59")).to_be_in_viewport()
    page.locator("#scroller").hover()
    page.mouse.wheel(0, -400)
    expect(page.get_by_role("button", name="To the latest message")).to_be_visible()
    top = page.locator("#scroller").evaluate("(node) => node.scrollTop")
    chat_server.resume()
    expect(answers(page).get_by_text("line 59")).to_have_count(2)
    assert abs(page.locator("#scroller").evaluate("(node) => node.scrollTop") - top) < 2
    page.get_by_role("button", name="To the latest message").click()
    chat_server.resume()
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


# Contrast by WCAG 2.2 of every visible text against its background, as [ratio, text]
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
    return a === 1 ? rgb : over(rgb, a, paper(node.parentElement)); // the root's background is opaque
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
def test_contrast(open_page, chat_server, scheme):
    """WCAG AA: at least 4.5 to 1 for text, 3 to 1 for the borders of input fields."""
    page = open_page(color_scheme=scheme)
    seen = {}

    def look():
        seen.update({text: ratio for ratio, text in page.evaluate(CONTRAST)})

    look()
    call = {"tool": {"expression": "1+1", "result": "2"}}
    chat_server.replies = [[*tokens(MARKDOWN), call], Refusal(500)]
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


def test_reduced_motion(open_page, chat_server):
    page = open_page(reduced_motion="reduce")
    chat_server.replies = [[WAIT]]
    say(page, "Hello")
    assert page.locator(".waiting").evaluate("(node) => getComputedStyle(node).animationName") == "none"
    chat_server.resume()


def test_japanese(open_page, chat_server):
    page = open_page(locale="ja-JP")
    expect(page.locator("html")).to_have_attribute("lang", "ja")
    page.get_by_label("\u30e1\u30c3\u30bb\u30fc\u30b8", exact=True).fill("Hello")
    page.get_by_role("button", name="\u9001\u4fe1").click()
    expect(answers(page)).to_have_text("Fine.")


def test_messages_are_not_marked_as_japanese(open_page):
    """The language of the whole page was Japanese, so a Japanese voice read the English answers."""
    page = open_page(locale="ja-JP")
    page.locator("#box").fill("Hello")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Fine.")
    for place in ("article .text", "article .prose", "#live", "#title", "#chats .title"):
        expect(page.locator(place)).to_have_attribute("lang", "")


def test_every_text_is_translated(open_page):
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
