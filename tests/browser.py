"""A page in Debian's Chromium, without a network, and everything that it did wrong.

Requests are intercepted, names lead nowhere, and whatever the page runs, says on its console, opens, asks for is kept.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

PHONE, TABLET, DESKTOP = 390, 820, 1440
_ARGUMENTS = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-gpu"]
_PROVOKE = """async () => {
  for (const one of document.querySelectorAll('details')) one.open = true;
  for (const one of document.querySelectorAll('*'))
    for (const kind of ['mouseover', 'mouseenter', 'focus', 'pointerdown', 'toggle', 'animationstart'])
      one.dispatchEvent(new Event(kind, {bubbles: true}));
  await new Promise(done => setTimeout(done, 300));
}"""


def chromium() -> str | None:
    """Where the browser is."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def missing() -> str:
    """Why no page can be opened; empty where it can."""
    if chromium() is None:
        return "no Chromium on this machine (Debian: apt-get install chromium): the pages were not opened in a browser"
    if importlib.util.find_spec("playwright") is None:
        return "no playwright in this environment: the pages were not opened in a browser"
    return ""


needed = pytest.mark.skipif(bool(missing()), reason=missing())
"""Marks a test that opens a page."""


@dataclass
class Tab:
    """An opened page. ``requests``: what it asked for beyond itself; ``said``: console; ``ran``: signs of code."""

    page: Page
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def provoke(self) -> None:
        """Whatever could run on a hover, a focus or a timer has its chance."""
        from playwright.sync_api import Error

        try:
            self.page.evaluate(_PROVOKE)
            if self.page.evaluate("window.__pwned !== undefined"):
                self.ran.append("window.__pwned")
        except Error as error:
            self.ran.append(f"left its page: {error.message}")

    @property
    def faults(self) -> dict[str, list[str]]:
        """Empty of a page that did nothing."""
        found = {"requests": self.requests, "console": self.said, "ran": self.ran}
        return {name: what for name, what in found.items() if what}


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """One Chromium for several tabs."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium(), args=_ARGUMENTS, chromium_sandbox=False)
        yield found
        found.close()


@contextlib.contextmanager
def opened(
    within: Browser, page: Path | str, *, width: int = DESKTOP, dark: bool = False, own: str = ""
) -> Iterator[Tab]:
    """A file, or an address on 127.0.0.1 with ``own`` the beginning of what it may ask for, in a tab of its own."""
    address = page if isinstance(page, str) else page.resolve().as_uri()
    context = within.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", service_workers="block"
    )
    tab = Tab(context.new_page())

    def request(route: Route) -> None:
        if route.request.url == address or (own and route.request.url.startswith(own)):
            route.continue_()
        else:
            tab.requests.append(route.request.url)
            route.abort()

    def dialog(found: Any) -> None:
        tab.ran.append(f"dialog: {found.message}")
        found.dismiss()

    context.route("**/*", request)
    tab.page.on("dialog", dialog)
    tab.page.on("console", lambda found: tab.said.append(found.text) if found.type in ("error", "warning") else None)
    tab.page.on("pageerror", lambda found: tab.said.append(str(found)))
    tab.page.on("websocket", lambda found: tab.requests.append(found.url))
    tab.page.goto(address)
    tab.page.on("framenavigated", lambda frame: tab.ran.append(f"navigated to {frame.url}"))
    context.on("page", lambda found: tab.ran.append(f"opened {found.url}"))
    try:
        yield tab
    finally:
        context.close()
