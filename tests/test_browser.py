"""The explorer page in a real browser, opened from disk."""

from pathlib import Path

import pytest

from tests.test_report import handmade

CHROMIUM = Path("/usr/bin/chromium")  # Debian's; playwright's own download is not used
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900, "light"), (400, 800, "dark")], ids=["wide", "narrow"])
def page(request, browser, tmp_path):
    """The handmade page, opened; the test fails if the browser complained or asked for anything that is not in the folder."""
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: complaints.append(sent.url) if not sent.url.startswith(("file:", "data:")) else None)
    page.goto(handmade(tmp_path).as_uri())
    yield page
    context.close()
    assert not complaints


def shown(page):
    return page.locator("article:visible").get_attribute("id")


def test_scatters_are_drawn_and_lead_to_their_queries(page):
    page.wait_for_selector("article:visible .plot .main-svg")
    assert page.locator("article:visible .plot .scatterlayer .point").count() == 12
    for panel in page.locator(".plot.overall").all():
        assert panel.locator(".scatterlayer .point").count() == 36 + 12  # all queries, and the chosen one once more
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("document.querySelector('.plot.overall').emit('plotly_click', {points: [{customdata: 1}]})")
    assert shown(page) == "query-101"


def test_what_the_checks_found_can_be_read(page):
    found = page.locator(".check")
    assert found.count() == 3  # two methods and what is the best possible
    for place in range(3):
        assert found.nth(place).is_visible()
        assert found.nth(place).evaluate("box => box.scrollWidth <= box.clientWidth")
    assert found.nth(0).locator("p").inner_text().startswith(("predicted vs actual r = ", "Predicted vs actual r = "))
    assert found.nth(1).locator("li").count() == 2
    assert "could pass r = 0.99" in found.nth(2).inner_text()


def test_queries_are_reached_by_link_button_key_and_address(page):
    assert shown(page) == "query-100"
    page.locator("nav a").nth(2).click()
    assert shown(page) == "query-102"
    assert page.url.endswith("#query-102")
    assert page.locator("nav a[aria-current]").count() == 1
    page.locator("article:visible [data-move='-1']").click()
    assert shown(page) == "query-101"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # there is none before the first
    assert shown(page) == "query-100"
    page.keyboard.press("ArrowRight")
    assert shown(page) == "query-101"
    page.go_back()
    assert shown(page) == "query-100"
    page.goto(page.url.partition("#")[0] + "#query-102")
    page.reload()
    assert shown(page) == "query-102"
    assert page.locator("article:visible .plot .scatterlayer .point").count() == 12


def test_links_are_reached_by_tab(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert shown(page) == "query-101"
