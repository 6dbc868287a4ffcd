"""The HTML page in a real browser: it asks for nothing, and everything on it answers to mouse and keyboard."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pages import many, page_of, run_of
from test_page import EVIL, hostile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine to open the page with"),
]

LOCAL = ("file:", "data:", "blob:")


@dataclass
class Opened:
    """A page in the browser, with what it asked for and complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def heard(self) -> None:
        """Fails where it asked for something, or something went wrong."""
        assert self.requests == []
        assert self.complaints == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    records = [record for record in many(147) if record.spec.target not in ("0.7", "4:8")]
    path.write_text(page_of([*records, run_of("wanda", "0.5", 0, model="vast")]), encoding="utf-8")
    return path


def opened(browser: Any, file: Path, *, width: int = 1440, height: int = 900, part: str = "", **options: Any) -> Opened:
    page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
    page.set_default_timeout(10_000)
    seen = Opened(page)
    page.on("request", lambda asked: None if asked.url.startswith(LOCAL) else seen.requests.append(asked.url))
    page.on("console", lambda said: seen.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.goto(f"{file.as_uri()}{part}")
    return seen


@pytest.fixture(scope="module")
def wide(browser: Any, file: Path) -> Opened:
    return opened(browser, file)


@pytest.fixture
def seen(wide: Opened) -> Iterator[Opened]:
    """The page, without filters, closed and at its top; afterwards nothing may have been asked for."""
    wide.page.keyboard.press("Escape")
    wide.page.locator("#filters [type=reset]").click()
    wide.page.evaluate("scrollTo(0, 0)")
    wide.page.mouse.move(1, 1)
    yield wide
    wide.heard()


def drawn(page: Any, selector: str) -> Any:
    """A figure, after plotly drew it."""
    chart = page.locator(selector).first
    chart.scroll_into_view_if_needed()
    chart.locator(".main-svg").first.wait_for()
    page.wait_for_timeout(300)
    return chart


def methods(page: Any) -> list[str]:
    return list(
        page.locator(".board:not([hidden]) >> nth=0")
        .locator("tbody tr:visible")
        .evaluate_all("all => all.map(r => r.dataset.method)")
    )


# Filters


def test_filters_leave_what_fits(seen: Opened) -> None:
    page = seen.page
    count = page.locator("#count").inner_text()
    assert re.fullmatch(r"\d+ rows in \d+ tables", count)
    page.select_option("[name=target]", "2:4")
    assert {*page.locator(".board:visible").evaluate_all("all => all.map(b => b.dataset.target)")} == {"2:4"}
    page.fill("[name=method]", "wanda perp")
    assert methods(page) == ["dense", "wanda + perp[steps=60,learning_rate=0.003,precision=bfloat16,mode=reconstruct]"]
    assert page.locator("#count").inner_text() != count
    page.select_option("[name=model]", "vast")
    assert page.locator("#nothing").is_visible()
    assert page.locator(".section[data-evaluation]:visible").count() == 0
    page.locator("#filters [type=reset]").click()
    page.locator("#count", has_text=count).wait_for()  # fields are empty a moment after the click


def test_figures_follow_the_filters(seen: Opened) -> None:
    page = seen.page
    chart = drawn(page, ".tradeoff .chart:not([hidden])")
    before = chart.locator(".scatterlayer .points path").count()
    page.fill("[name=method]", "sparsegpt")
    page.wait_for_function(
        "chart => chart.querySelectorAll('.scatterlayer .points path').length === 1", arg=chart.element_handle()
    )
    assert before > 5


# Tables


def test_headings_sort_by_numbers_and_back(seen: Opened) -> None:
    page = seen.page
    heading = page.locator(".board").first.locator("thead th", has_text="peak MiB")
    column = heading.evaluate("th => [...th.parentNode.children].indexOf(th)")
    original = methods(page)

    def numbers() -> list[float]:
        cells = page.locator(".board").first.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
        return [float(text.rstrip("*").replace(",", "")) for text in cells[1:]]  # dense stays on top

    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert numbers() == sorted(numbers())
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "descending"
    assert numbers() == sorted(numbers(), reverse=True)
    assert methods(page)[0] == "dense"
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "none"
    assert methods(page) == original


def test_the_interval_shows_on_hovering_and_on_focus(seen: Opened) -> None:
    page = seen.page
    row = page.locator("tr.best").first
    row.scroll_into_view_if_needed()
    row.locator("td").nth(2).hover()
    tip = page.locator("#tip")
    assert re.search(r"vs dense % [-+][\d.]+ \[[-+][\d.]+, [-+][\d.]+\], 95% interval", tip.inner_text())
    page.mouse.move(1, 1)
    assert tip.is_hidden()
    page.keyboard.press("Tab")
    row.locator(".open").focus()
    assert "95% interval" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()


# Records


def test_a_row_opens_its_records(seen: Opened) -> None:
    page = seen.page
    row = page.locator("tbody tr", has_text="sparsegpt").first
    row.locator("td").last.click()
    panel = page.locator("#panel")
    assert panel.is_visible()
    assert page.locator("#panel-title").inner_text() == "sparsegpt"
    assert panel.locator(".tabs button").all_inner_texts() == ["seed 0", "seed 1", "seed 2"]
    assert "--only 'tiny sparsegpt 0.5, seed 0' --again" in panel.locator(".command code").inner_text()
    for heading in ("Result", "Zeros found", "Specification", "Provenance"):
        assert panel.get_by_role("heading", name=heading, exact=True).is_visible()
    panel.locator(".tabs button").nth(2).click()
    assert "seed 2" in panel.locator(".where").first.inner_text()
    cited = page.url.partition("#record=")[2]
    assert re.fullmatch("[0-9a-f]{12}", cited)
    page.keyboard.press("Escape")
    assert panel.is_hidden()
    assert "#" not in page.url


def test_enter_opens_a_row_and_gives_the_focus_back(seen: Opened) -> None:
    page = seen.page
    button = page.locator("tr.best .open").first
    button.focus()
    page.keyboard.press("Enter")
    assert page.locator("#panel").is_visible()
    assert page.evaluate("document.activeElement.id") == "panel-title"
    page.locator("#panel-close").click()
    assert button.evaluate("button => button === document.activeElement")


def test_a_link_cites_a_record_and_figures_wait_to_be_seen(browser: Any, file: Path, wide: Opened) -> None:
    key = wide.page.locator("tr.best").first.get_attribute("data-runs").split()[0]
    cited = opened(browser, file, part=f"#record={key}")
    panel = cited.page.locator("#panel")
    assert panel.locator(".where a").inner_text() == key
    cited.page.evaluate("location.hash = '#record=nothing'")
    assert "has no record nothing" in panel.inner_text()
    cited.page.evaluate(f"location.hash = '#record={key[:7]}'")
    panel.locator(".where a").wait_for()
    cited.page.evaluate("location.hash = ''")
    panel.wait_for(state="hidden")
    assert cited.page.locator(".chart:has(.main-svg)").count() < cited.page.locator(".chart").count() / 2
    cited.heard()


def test_what_failed_is_listed_and_opens(seen: Opened) -> None:
    page = seen.page
    page.locator(".runs .open").first.click()
    assert "out of memory in block 3" in page.locator("#panel").inner_text()


# Figures


def test_a_point_opens_its_records(seen: Opened) -> None:
    page = seen.page
    chart = drawn(page, ".tradeoff .chart:not([hidden])")
    box = chart.locator(".scatterlayer .trace .points path").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator("#tip").wait_for()
    assert "95% from" in page.locator("#tip").inner_text()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator("#panel").is_visible()


def test_the_keyboard_walks_over_points(seen: Opened) -> None:
    page = seen.page
    for selector in (".tradeoff .chart:not([hidden])", ".phases .chart", "#heats .chart"):
        chart = drawn(page, selector)
        chart.focus()
        page.keyboard.press("ArrowRight")
        first = page.locator("#said").inner_text()
        page.keyboard.press("End")
        assert page.locator("#said").inner_text() != first
        assert chart.locator(".ring").is_visible()
        page.keyboard.press("Enter")
        assert page.locator("#panel").is_visible()
        page.keyboard.press("Escape")
        assert page.locator("#panel").is_hidden()


def test_the_cost_can_be_chosen(seen: Opened) -> None:
    page = seen.page
    figure = page.locator(".tradeoff").first
    figure.get_by_role("button", name="peak memory").click()
    assert figure.locator(".chart:visible").count() == 1
    chart = drawn(page, ".tradeoff .chart:not([hidden])")
    assert "peak memory" in chart.get_attribute("aria-label")
    assert "MiB" in chart.locator(".xtitle").text_content()


# Light, dark, and small


def test_the_theme_is_switched_and_figures_follow(seen: Opened) -> None:
    page = seen.page
    chart = drawn(page, ".tradeoff .chart:not([hidden])")
    ground = "getComputedStyle(document.body).backgroundColor"
    light, text = page.evaluate(ground), chart.locator(".xtick text").first.evaluate("text => getComputedStyle(text).fill")
    button = page.locator("#theme")
    button.click()
    button.click()
    assert button.inner_text() == "Theme: dark"
    assert page.evaluate(ground) != light
    drawn(page, ".tradeoff .chart:not([hidden])")
    assert chart.locator(".xtick text").first.evaluate("text => getComputedStyle(text).fill") != text
    button.click()
    assert page.evaluate(ground) == light


def test_the_system_s_dark_is_taken(seen: Opened) -> None:
    seen.page.emulate_media(color_scheme="dark")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"
    seen.page.emulate_media(color_scheme="light")


def test_nothing_but_tables_goes_sideways(browser: Any, file: Path) -> None:
    phone = opened(browser, file, width=390, height=844, reduced_motion="reduce")
    page = phone.page
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    drawn(page, ".tradeoff .chart:not([hidden])")
    drawn(page, "#heats .chart")
    for width in (320, 390, 820):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator(".box").first
        assert width > 400 or box.evaluate("box => box.scrollWidth > box.clientWidth")
        page.locator("tr.best .open").first.click()
        assert page.evaluate("document.querySelector('#panel').scrollWidth") <= width
        page.keyboard.press("Escape")
    phone.heard()


# Strangers


def test_nothing_of_strangers_runs(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(page_of(hostile(" ".join(EVIL))), encoding="utf-8")
    shown = opened(browser, path)
    shown.page.on("dialog", lambda dialog: shown.complaints.append(dialog.message))
    drawn(shown.page, ".chart:not([hidden])")
    drawn(shown.page, ".phases .chart")
    for opener in shown.page.locator("tbody tr .open").all()[:3]:
        opener.click()
        assert shown.page.locator("#panel").is_visible()
        assert shown.page.locator("#panel img, #panel svg, #panel script").count() == 0
        shown.page.keyboard.press("Escape")
    assert shown.page.locator("a[href^=javascript], a[*|href^=javascript]").count() == 0
    shown.heard()
