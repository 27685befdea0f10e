"""The report in a real browser: tabs, plots, hostile captions, narrow screens, dark mode."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import pools, shard_files

from d2filter.cli.main import main
from d2filter.tools import sweep, sweep_plots

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)",
    ),
]

EVIL = (
    "<script>window.taken = 1</script><img src='https://evil.example/x.png' "
    "onerror='window.taken = 2'></script></div><a href='javascript:window.taken = 3'>x</a>"
)
MANY = 42
"""settings of the sweep whose page is looked at; its plots show the first 40"""
TABS = ("overview", "scores", "coverage", "sweep", "pictures", "settings")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A report with every tab; each caption tries to run a script."""
    folder = tmp_path_factory.mktemp("page")
    pool = pools.make(200, 6, copies=0.5)
    files = []
    for i, uid in enumerate(pool["uid"]):
        files += shard_files.members(f"{i:05d}", i % 10, uid=uid)[::2]
        files.append((f"{i:05d}.txt", f"{EVIL} {'long' * 40}".encode()))
    shard = str(shard_files.write(folder / "s.tar", files))
    columns = {"shard": [shard] * 200, "key": [f"{i:05d}" for i in range(200)]}
    pools.write(folder / "m", pool, columns=columns)
    out = str(folder / "o")
    words = ["--metadata-dir", str(folder / "m"), "--out-dir", out, "--n-neighbors", "3"]
    assert main(["run", *words, "--no-report"]) == 0
    assert main(["sweep", out, "--gamma", "0.3,1", "--fraction", "0.1,0.3"]) == 0
    assert main(["report", out, "--shards", shard]) == 0
    assert main(["advise", out]) == 0
    gammas = ",".join(str(number) for number in range(1, MANY + 1))
    assert main(["sweep", out, "--gamma", gammas, "--fraction", "0.1,0.3"]) == 0
    return folder / "o/report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def look(browser: Any, page: Path, width: int, scheme: str = "light") -> None:
    browser.get("about:blank")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    as_if(browser, scheme)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(page.as_uri())


def as_if(browser: Any, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def drawn(browser: Any) -> list[str]:
    """Visible plots whose canvas is not empty."""
    script = """
      const found = [];
      const roots = (node) => [node, ...[...node.querySelectorAll('*')]
        .filter((e) => e.shadowRoot).flatMap((e) => roots(e.shadowRoot))];
      for (const place of document.querySelectorAll('section:not([hidden]) .plot')) {
        const canvases = roots(place).flatMap((root) => [...root.querySelectorAll('canvas')]);
        if (canvases.some((c) => c.width && new Uint32Array(c.getContext('2d')
            .getImageData(0, 0, c.width, c.height).data.buffer).some((pixel) => pixel !== 0)))
          found.push(place.id);
      }
      return found;"""
    found: list[str] = browser.execute_script(script)
    return found


def wait_for_plots(browser: Any) -> list[str]:
    places = browser.find_elements("css selector", "section:not([hidden]) .plot")
    wanted = sorted(place.get_attribute("id") for place in places)
    until = time.monotonic() + 30
    while sorted(drawn(browser)) != wanted and time.monotonic() < until:
        time.sleep(0.1)
    assert sorted(drawn(browser)) == wanted
    return wanted


@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_opens_with_its_plots_and_nothing_overflows(
    browser: Any, page: Path, width: int
) -> None:
    look(browser, page, width)
    tabs = browser.find_elements("css selector", "[role=tab]")
    assert [tab.get_attribute("aria-controls") for tab in tabs] == list(TABS)
    plots = []
    for tab, name in zip(tabs, TABS, strict=True):
        tab.click()
        (seen,) = (
            panel.get_attribute("id")
            for panel in browser.find_elements("css selector", "[role=tabpanel]")
            if panel.is_displayed()
        )
        assert seen == name
        plots += wait_for_plots(browser)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        # nothing is cut off either: what is wider than its card can be scrolled
        over = browser.execute_script(
            """return [...document.querySelectorAll('section:not([hidden]) *')]
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1
              && !e.closest('.scroll')).map((e) => e.outerHTML.slice(0, 200))"""
        )
        assert over == []
    assert len(plots) == 11


def test_a_caption_is_text_and_no_request_leaves_the_page(browser: Any, page: Path) -> None:
    look(browser, page, 1280)
    for tab in browser.find_elements("css selector", "[role=tab]"):
        tab.click()
        wait_for_plots(browser)
    shown = browser.find_elements("css selector", ".caption")
    assert len(shown) > 20
    assert all(EVIL in caption.get_attribute("textContent") for caption in shown)
    assert browser.execute_script("return window.taken === undefined")
    assert not browser.find_elements("css selector", "main a, main img:not([src^='data:'])")
    events = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in asked
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert {url for url in asked if url.startswith("file:")} == {page.as_uri()}
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_even_an_unescaped_caption_would_run_nothing(
    browser: Any, page: Path, tmp_path: Path
) -> None:
    """The policy holds on its own: here the page's own escaping is undone."""
    text = page.read_text()
    spoiled = re.sub(r'<div class="caption">[^<]*', f'<div class="caption">{EVIL}', text)
    assert spoiled != text
    (tmp_path / "spoiled.html").write_text(spoiled)
    look(browser, tmp_path / "spoiled.html", 1280)
    wait_for_plots(browser)
    assert browser.execute_script("return window.taken === undefined")
    refused = [line["message"] for line in browser.get_log("browser")]
    assert any("Content Security Policy" in line for line in refused)


def test_the_page_follows_the_light(browser: Any, page: Path) -> None:
    look(browser, page, 1280, "dark")
    wait_for_plots(browser)
    color = "return getComputedStyle(document.body).backgroundColor"
    pixels = """
      const roots = (node) => [node, ...[...node.querySelectorAll('*')]
        .filter((e) => e.shadowRoot).flatMap((e) => roots(e.shadowRoot))];
      const canvas = roots(document.querySelector('#plot-seconds'))
        .flatMap((root) => [...root.querySelectorAll('canvas')])[0];
      return canvas.toDataURL();"""
    dark = browser.execute_script(color), browser.execute_script(pixels)
    as_if(browser, "light")
    time.sleep(0.3)
    wait_for_plots(browser)
    light = browser.execute_script(color), browser.execute_script(pixels)
    assert dark[0] != light[0]
    assert dark[1] != light[1]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_advice_opens_with_its_plot_and_nothing_overflows(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    look(browser, page.with_name("advise.html"), width, scheme)
    assert wait_for_plots(browser) == ["plot-trials"]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert severe == []


@pytest.mark.parametrize(
    ("width", "scheme"), [(1440, "light"), (768, "dark"), (390, "dark"), (390, "light")]
)
def test_a_sweep_of_many_settings_opens_with_its_plots_and_nothing_overflows(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    look(browser, page.with_name("sweep") / "plot.html", width, scheme)
    measured = [*sweep.MEASURES, "score-coverage"]
    assert wait_for_plots(browser) == sorted(f"plot-{name}" for name in measured)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    legend = browser.find_elements("css selector", ".legend button")
    assert [entry.text for entry in legend] == [
        f"d2 k=3 gamma={gamma}.0" for gamma in range(1, sweep_plots.MOST_CURVES + 1)
    ]
    looks = {
        (path.get_attribute("stroke-dasharray"), svg.get_attribute("style"))
        for svg in browser.find_elements("css selector", ".legend svg")
        for path in svg.find_elements("css selector", "path[stroke]")
    }
    assert len(looks) == len(legend)
    assert "the other 2 are in the table" in browser.page_source
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_the_legend_of_a_sweep_fades_the_other_settings(browser: Any, page: Path) -> None:
    look(browser, page.with_name("sweep") / "plot.html", 1440)
    wait_for_plots(browser)
    full = """return [...Bokeh.index.roots].filter((view) => view.model.type === "Figure")
      .flatMap((view) => view.model.renderers).map(({data_source: source}) => {
        const settings = [...source.get_column("setting")];
        return [...new Set(source.selected.indices.map((row) => settings[row]))];
      })"""
    figures = len(sweep.MEASURES) + 1
    entry = browser.find_elements("css selector", ".legend button")[7]
    entry.click()
    assert entry.get_attribute("aria-pressed") == "true"
    assert browser.execute_script(full) == [["d2 k=3 gamma=8.0"]] * (2 * figures)
    # the choice outlives a change of the colors
    as_if(browser, "dark")
    time.sleep(0.3)
    wait_for_plots(browser)
    assert browser.execute_script(full) == [["d2 k=3 gamma=8.0"]] * (2 * figures)
    entry.click()
    assert browser.execute_script(full) == [[]] * (2 * figures)


def test_tabs_are_reached_by_keys(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, page, 1280)
    first, second, *_ = browser.find_elements("css selector", "[role=tab]")
    first.send_keys(Keys.ARROW_RIGHT)
    assert second.get_attribute("aria-selected") == "true"
    assert browser.switch_to.active_element == second
    second.send_keys(Keys.ARROW_LEFT)
    assert first.get_attribute("aria-selected") == "true"
