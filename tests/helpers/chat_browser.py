"""Fixtures for tests of the chat page: a real browser and a server with scripted answers.

A test module enables them with `pytest_plugins = "tests.helpers.chat_browser"`.
"""

import os
import shutil

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.helpers.chat_page import PATIENCE_S
from tests.helpers.fake_chat_server import FakeChatServer

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
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
def chat_server():
    """A server per test. Its port gives each test its own origin, so browser storage is not shared."""
    with FakeChatServer() as server:
        yield server


@pytest.fixture(scope="module")
def context(browser):
    return browser.new_context(locale="en-US")


@pytest.fixture
def open_page(browser, context, chat_server):
    """Return a function that opens the page; with options, in a browser context of its own.

    Errors on the page's console fail the test, except for refused requests.
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
        page.goto(chat_server.url)
        return page

    yield open_page
    for place in opened:
        place.close()
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


@pytest.fixture
def page(open_page):
    return open_page()
