"""A real browser opens the page: nothing to complain of, nothing fetched, nothing wider than the screen."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from featherweight.report import compare_reports, render
from tests.report.browser import Page, browse, find_chromium
from tests.report.sample import sample_report
from tests.report.test_channels import ROWS
from tests.report.test_page import SECTIONS, long_layers, poisoned, small_report

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no chromium on this machine; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pages")
    large = sample_report()
    long_layers(large)
    pages = {
        "sample": render(sample_report()),
        "hostile": render(poisoned(small_report())),
        "large": render(large),
        "empty": render({}),
        "cut": render({**sample_report(), "channels": ROWS * 25}),
        "compared": compare_reports([sample_report(), poisoned(small_report())]),
    }
    for name, html in pages.items():
        (found / f"{name}.html").write_text(html, encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browse(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["sample", "hostile", "large", "empty", "cut", "compared"])
def test_the_page_is_quiet_fetches_nothing_and_fits_the_screen(page: Page, folder: Path, name: str, width: int) -> None:
    page.open(folder / f"{name}.html", width)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    asked = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(folder / f"{name}.html").as_uri()]
    told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    assert [event for event in page.events if event.get("method") in told] == []


def test_headings_are_there_and_their_sections_are_seen(page: Page, folder: Path) -> None:
    page.open(folder / "sample.html", 1440)
    headings = page.evaluate("[...document.querySelectorAll('h2')].map(one => one.textContent)")
    assert headings == SECTIONS
    assert page.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
    heights = page.evaluate("[...document.querySelectorAll('section, svg.plot')].map(one => one.clientHeight)")
    assert len(heights) > 15 and min(heights) > 30


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_its_ground_in_light_and_dark(page: Page, folder: Path, dark: bool) -> None:
    """Oracle: the contrast ratio of WCAG 2, at least 4.5 to 1 for text."""
    page.open(folder / "sample.html", 1440, dark=dark)
    colours = page.evaluate(
        """[...document.querySelectorAll('p, li, th, td, dt, dd, h1, h2, b, .muted, .change, .value, text')]
        .filter(one => one.textContent.trim() && !one.closest('.badge'))
        .map(one => { const style = getComputedStyle(one); return one.tagName === 'text' ? style.fill : style.color })"""
    )
    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (ground < 0.05) == dark
    for colour in set(colours):
        high, low = sorted((luminance(colour), ground), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, WCAG 2.2."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_wide_tables_scroll_in_their_own_box_by_keyboard(page: Page, folder: Path) -> None:
    page.open(folder / "large.html", 390)
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth > b.clientWidth, b.tabIndex, b.clientHeight])"
    )
    assert any(wider for wider, _, _ in boxes) and all(index == 0 for _, index, _ in boxes)
    assert max(height for _, _, height in boxes) < 700  # 400 layers in a box, not down the page


def test_paper_is_light_and_has_whole_tables(page: Page, folder: Path) -> None:
    page.open(folder / "large.html", 700, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
        tall = page.evaluate("Math.max(...[...document.querySelectorAll('.scroll')].map(b => b.clientHeight))")
        assert tall > 4000
    finally:
        page.call("Emulation.setEmulatedMedia", media="")


def test_the_pictures_are_drawn_in_the_colours_of_the_theme(page: Page, folder: Path) -> None:
    strokes = []
    for dark in (False, True):
        page.open(folder / "sample.html", 1440, dark=dark)
        strokes.append(page.evaluate("getComputedStyle(document.querySelector('.curve.metric')).stroke"))
    assert strokes[0] != strokes[1]
