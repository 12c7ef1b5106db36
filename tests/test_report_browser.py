"""The report in a browser: it sorts, filters and explains itself, asks for nothing, and fits screens of any kind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_runs import make_run, make_study
from secateur.report import save_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'secateur[dev]'")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="no Chromium with its chromedriver on this machine (Debian, Ubuntu: apt install chromium chromium-driver)",
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--no-first-run"),
)
ERROR = "</pre><script>document.title = 'broken'</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of l1 at 75 % nothing was run, so that a value is missing.
    runs = [r for r in make_study() + make_study("deit", seeds=(0,)) if (r.criterion, r.ratio) != ("l1", 0.75)]
    runs += [
        make_run("l1", 0.75, "clip"),
        make_run(None, 0.0, None, data="pooled"),
        make_run("l1", 0.5, None, data="pooled"),
    ]
    runs.append(replace(make_run("random", 0.5), status="failed", error=ERROR, test_acc=None, curve=(), widths=()))
    return save_report(runs, tmp_path_factory.mktemp("report"))[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser: Any, page: Path) -> Any:
    """The page, just opened, on a wide and light screen."""
    look(browser, 1200, 900)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def look(browser: Any, width: int, height: int, scheme: str = "light", media: str = "screen") -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def find(browser: Any, css: str) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, css)


def column(browser: Any, table: str, label: str) -> list[str]:
    """The texts of a column, top to bottom, of the rows that are to be seen."""
    script = """
        const heads = [...document.querySelectorAll(`${arguments[0]} thead tr:last-child th`)];
        const place = heads.findIndex((head) => head.textContent === arguments[1]);
        const rows = [...document.querySelectorAll(`${arguments[0]} tbody tr`)].filter((row) => row.offsetParent);
        return rows.map((row) => row.cells[place].textContent);"""
    return browser.execute_script(script, table, label)


def sort_by(browser: Any, table: str, label: str) -> Any:
    head = next(e for e in find(browser, f"{table} thead tr:last-child th") if e.text == label)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", head)
    head.find_element(By.TAG_NAME, "button").click()
    return head


def choose(browser: Any, facet: str, value: str) -> None:
    browser.execute_script(
        "const s = document.querySelector(`select[data-facet='${arguments[0]}']`); s.value = arguments[1];"
        "s.dispatchEvent(new Event('input', {bubbles: true}))",
        facet,
        value,
    )


def hover(browser: Any, element: Any) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser).move_to_element(element).perform()


def details(browser: Any) -> str:
    (box,) = find(browser, "#details")
    return box.text if box.is_displayed() else ""


def test_nothing_is_asked_of_the_network_and_nothing_is_wrong(shown: Any, page: Path) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in shown.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith("data:")] == [page.as_uri()]
    assert shown.get_log("browser") == []
    assert shown.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_content_policy_forbids_what_the_page_must_not_do(shown: Any) -> None:
    blocked = shown.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', (e) => done(e.blockedURI));"
        "new Image().src = 'http://127.0.0.1:9/picture.png'; setTimeout(() => done('nothing'), 2000)"
    )
    assert blocked.startswith("http://127.0.0.1:9")
    shown.get_log("browser")


def test_an_error_with_markup_in_it_stays_text(shown: Any) -> None:
    assert shown.title != "broken"
    assert ERROR in find(shown, "#failures pre")[0].text


@pytest.mark.parametrize("label", ["Test acc. %", "ΔAcc points", "Ratio", "Params left"])
def test_numbers_sort_by_their_value_both_ways_with_missing_ones_last(shown: Any, label: str) -> None:
    table = "#tables figure:nth-of-type(2) table"
    units = {"k": 1e3, "M": 1e6}

    def value(text: str) -> float | None:
        # The dense model has no ratio written down, which is one of 0.
        parts = re.fullmatch(r"([+\N{MINUS SIGN}]?[\d.]+)(?: ([kM%])| ± [\d.]+)?", text or "0 %")
        return float(parts[1].replace("\N{MINUS SIGN}", "-")) * units.get(parts[2], 1) if parts else None

    before = column(shown, table, label)
    for direction, sign in (("ascending", 1), ("descending", -1)):
        head = sort_by(shown, table, label)
        assert head.get_attribute("aria-sort") == direction
        after = [value(text) for text in column(shown, table, label)]
        known = [v for v in after if v is not None]
        assert known == sorted(known, key=lambda v: sign * v) and len(set(known)) > 1
        assert after[len(known) :] == [None] * (len(after) - len(known))
        assert sorted(column(shown, table, label)) == sorted(before)


def test_words_sort_by_the_alphabet(shown: Any) -> None:
    sort_by(shown, "#runs table", "Group score")
    found = column(shown, "#runs table", "Group score")
    assert found == sorted(found) and len(set(found)) == 4


def test_filters_hide_rows_and_points_and_reset_brings_them_back(shown: Any) -> None:
    def counts() -> tuple[int, int]:
        script = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.getClientRects().length).length"
        return shown.execute_script(script, "#runs tbody tr"), shown.execute_script(script, "#figures .point")

    rows, points = counts()
    choose(shown, "model", "deit")
    assert set(column(shown, "#runs table", "Model")) == {"deit"}
    assert all(e.get_attribute("data-model") == "deit" for e in find(shown, "#figures .point:not(.out)"))
    choose(shown, "ratio", "50 %")
    assert set(column(shown, "#runs table", "Ratio")) == {"50 %"}
    assert 0 < counts()[0] < rows and 0 < counts()[1] < points
    assert "rows" in find(shown, ".filters output")[0].text
    find(shown, ".filters button[type=reset]")[0].click()
    shown.execute_async_script("setTimeout(arguments[0], 50)")
    assert counts() == (rows, points)
    find(shown, "#find")[0].send_keys("HESSIAN")
    assert set(column(shown, "#runs table", "Group score")) == {"hessian"}


def test_hovering_a_row_shows_configuration_and_command_of_its_run(shown: Any) -> None:
    row = next(
        e for e in find(shown, "#runs tbody tr") if "photo" in e.text and "hessian" in e.text and "75 %" in e.text
    )
    assert details(shown) == ""
    hover(shown, row)
    text = details(shown)
    assert "secateur sweep --only vit-hessian-0.75-photo-0" in text
    assert "prune.ratio" in text and "0.75" in text and "split.unseen" in text
    hover(shown, find(shown, "h1")[0])
    assert details(shown) == ""


def test_hovering_a_point_tells_of_all_runs_behind_it_and_a_click_keeps_that(shown: Any) -> None:
    # Of points that lie on one another, the last drawn is the one that a pointer meets.
    point = find(shown, "#figures figure:first-of-type .point")[-1]
    hover(shown, point)
    text = details(shown)
    assert text.startswith(point.get_attribute("aria-label"))
    behind = point.get_attribute("data-runs").split()
    assert len(behind) >= 2 and text.count("secateur sweep --only deit-") == len(behind)
    ActionChains(shown).click().perform()
    hover(shown, find(shown, "h1")[0])
    assert details(shown) != ""
    ActionChains(shown).send_keys(Keys.ESCAPE).perform()
    assert details(shown) == ""


def test_a_curve_is_hovered_as_a_whole(shown: Any) -> None:
    curve = find(shown, "#curves details[open] .path")[0]
    hover(shown, curve)
    assert "secateur sweep --only vit-None-0.0-" in details(shown)


def test_the_keyboard_reaches_every_row_and_point(shown: Any) -> None:
    chart = find(shown, "#figures .chart")[0]
    stops = chart.find_elements(By.CSS_SELECTOR, "[tabindex='0']")
    points = chart.find_elements(By.CSS_SELECTOR, ".point")
    assert stops == points[:1] and len(points) > 2
    shown.execute_script("arguments[0].focus()", points[0])
    first = details(shown)
    ActionChains(shown).send_keys(Keys.ARROW_RIGHT).perform()
    assert shown.switch_to.active_element == points[1]
    assert details(shown) not in ("", first)
    ActionChains(shown).send_keys(Keys.ENTER, Keys.ESCAPE).perform()
    assert details(shown) == "" and shown.switch_to.active_element == points[1]


@pytest.mark.parametrize("width", [340, 390, 800])
def test_the_page_is_no_wider_than_a_narrow_screen(shown: Any, width: int) -> None:
    look(shown, width, 800)
    assert shown.execute_script("return document.documentElement.scrollWidth") <= width
    texts = shown.execute_script(
        "return [...document.querySelectorAll('#figures .chart text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert min(texts) > 9


def test_colours_follow_the_scheme_of_the_reader(shown: Any) -> None:
    script = "return getComputedStyle(document.body).backgroundColor"
    assert shown.execute_script(script) == "rgb(255, 255, 255)"
    look(shown, 1200, 900, scheme="dark")
    assert max(int(c) for c in shown.execute_script(script)[4:-1].split(",")) < 60
    ink = shown.execute_script("return getComputedStyle(document.querySelector('.chart text')).fill")
    assert min(int(c) for c in ink[4:-1].split(",")) > 150


def test_print_is_light_whole_and_without_controls(shown: Any) -> None:
    look(shown, 1000, 900, scheme="dark", media="print")
    shown.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert shown.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not find(shown, ".filters")[0].is_displayed() and not find(shown, "nav")[0].is_displayed()
    assert not find(shown, "main details:not([open])")
    clipped = (
        "return [...document.querySelectorAll('.scroll')].filter((e) => getComputedStyle(e).overflowY !== 'visible')"
    )
    assert shown.execute_script(clipped) == []
