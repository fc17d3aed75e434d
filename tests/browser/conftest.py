"""Pages opened in headless Chromium from a file, with no network; what the console said is kept. Skips without Chromium."""

from pathlib import Path

import pytest


@pytest.fixture
def open_page(browser):
    """Open a file: a page whose `errors` are what its console said, and whose `asked` are requests beyond the file."""
    contexts = []

    def opened(path, *, width=1440, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.errors, page.asked = [], []
        page.on("console", lambda said: page.errors.append(said.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        address = Path(path).as_uri()
        page.on("request", lambda request: page.asked.append(request.url) if request.url != address else None)
        page.goto(address)
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def complaints():
    """What axe-core finds wrong with an open page, a line each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()

    def found(page):
        violations = axe.run(page).response["violations"]
        return [
            f"{v['id']}: {len(v['nodes'])} times, as in {v['nodes'][0]['html'][:120]}" for v in violations
        ]

    return found
