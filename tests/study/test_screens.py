"""The HTML report in a real browser: no request, no error, nothing wider than the screen, a value at each point."""

from __future__ import annotations

import browser
import numpy as np
import pytest
from PIL import Image
from tables import study

from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.report.report import write_report

pytestmark = [pytest.mark.long, pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")]
GRID = {Cell(size, processes): size**0.7 * processes**0.8 * 900 for size in (50, 200, 1000, 4000)
        for processes in (1, 2, 4)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(browser, address of a report, its folder)."""
    folder = tmp_path_factory.mktemp("study")
    rows = study(GRID, 8, 0.03, seed=1)
    rows[3] |= {"status": "failed", "reason": "MemoryError: " + "no room " * 40}
    write_report(folder, rows)
    opened = browser.Browser(browser.find(), tmp_path_factory.mktemp("profile"))
    yield opened, (folder / "report.html").as_uri(), folder
    opened.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_on_a_screen(width, dark, page):
    opened, address, folder = page
    opened.open(address, width=width, dark=dark)
    requests = [event["params"]["request"]["url"] for event in opened.events
                if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert not [event for event in opened.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded",
                                                                        "Runtime.consoleAPICalled")]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
    assert opened.evaluate("document.querySelectorAll('figure svg').length") == 5
    # the smallest text of a picture, as it is on the screen
    smallest = opened.evaluate("Math.min(...[...document.querySelectorAll('svg text')].map("
                               "t => t.getBoundingClientRect().height))")
    assert smallest >= 9.0
    opened.screenshot(folder / f"{width}-{dark}.png")
    picture = np.asarray(Image.open(folder / f"{width}-{dark}.png").convert("L"))
    assert width - 20 <= picture.shape[1] <= width and picture.shape[0] > 2000, "less a scroll bar"
    assert (np.median(picture) < 60) == dark, "the page's ground"
    assert picture.std() > 10, "and something on it"


def test_each_point_has_its_value_as_a_title(page):
    opened, address, _ = page
    opened.open(address, width=390, dark=False)
    titles = opened.evaluate("[...document.querySelectorAll('figure svg use > title')].map(t => t.textContent)")
    assert len(titles) > 5 * 12 and any(title.startswith("batch 50 on 1 process: ") for title in titles)
    assert opened.evaluate("document.scripts.length") == 0
