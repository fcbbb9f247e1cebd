"""The report's page in a real browser: tables sort, filters and the threshold work, pictures load, nothing is asked of
the network, hostile names stay text."""

import json

import cv2
import numpy as np
import pytest
from browser import Browser, needs_browser
from synthetic import coco_case

from report import write_report
from report_read import problem_of

pytestmark = needs_browser()
HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><b>{}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    content, results = coco_case(9, images=12, name=HOSTILE)
    (folder / "images").mkdir()
    for n, image in enumerate(content["images"]):
        image["file_name"] = f"'\"><svg onload=alert(2)>#{n}%41?.png".replace("/", "_")
        picture = np.full((image["height"], image["width"], 3), 20 * n, np.uint8)
        cv2.imwrite(str(folder / "images" / image["file_name"]), picture)
    problem = problem_of("coco", "<i>truth</i>", content, [folder / "images"])
    write_report(
        problem, {"first": results, "<u>second</u>": results[::2]}, folder / "report", pictures=6, resamples=50
    )
    return folder / "report/index.html"


@pytest.fixture(scope="module", params=[(1400, False), (360, True)], ids=["1400 light", "360 dark"])
def browser(request, page):
    width, dark = request.param
    with Browser(width, 900) as one:
        one.dark(dark)
        one.open(page)
        yield one
        assert one.problems == []


def column(browser, k, table="#classes-1 table"):
    return browser.js(f"[...document.querySelectorAll('{table} tbody tr')].map(r => r.cells[{k}].textContent)")


def test_the_page_is_as_wide_as_the_window_and_has_no_errors(browser):
    width = browser.js("innerWidth")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.problems == []


def test_a_click_on_a_header_sorts_and_another_turns_the_order(browser):
    button = "document.querySelectorAll('#classes-1 thead button')[1]"
    browser.js(f"{button}.click()")
    falling = [int(v) for v in column(browser, 1)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 2
    browser.js(f"{button}.click()")
    assert [int(v) for v in column(browser, 1)] == falling[::-1]
    assert browser.js(f"{button}.parentElement.getAttribute('aria-sort')") == "ascending"


def test_undefined_values_sort_to_the_end(browser):
    button = "document.querySelectorAll('#classes-1 thead button')[4]"
    for _ in range(2):
        browser.js(f"{button}.click()")
        assert column(browser, 4)[-1] == "–"


def test_headers_sort_by_the_keyboard_too(browser):
    browser.js("document.querySelectorAll('#classes-1 thead button')[2].focus()")
    browser.press("Enter", 13)
    values = [int(v) for v in column(browser, 2)]
    assert values == sorted(values, reverse=True)


def test_the_filter_shows_the_rows_that_hold_its_text(browser):
    browser.js("i = document.querySelector('#classes-1 input'); i.value = '<B>3'; i.dispatchEvent(new Event('input'))")
    shown = browser.js("[...document.querySelectorAll('#classes-1 tbody tr')].filter(r => !r.hidden).length")
    assert shown == 1
    browser.js("i.value = ''; i.dispatchEvent(new Event('input'))")
    assert browser.js("[...document.querySelectorAll('#classes-1 tbody tr')].filter(r => !r.hidden).length") == 7


def test_the_threshold_shows_precision_and_recall_there(browser, page):
    browser.js("document.querySelector('[data-threshold] input').value = 0.5")
    browser.js("document.querySelector('[data-threshold] input').dispatchEvent(new Event('input'))")
    text = browser.js("document.querySelector('[data-threshold] .out').textContent")
    table = json.loads((page.parent / "report.json").read_text())["models"][0]["thresholds"]["table"]
    row = next(r for r in table if r["threshold"] == 0.5)
    assert f"precision {row['precision']:.3f}, recall {row['recall']:.3f}, F1 {row['f1']:.3f}" in text
    model = json.loads((page.parent / "report.json").read_text())["models"][0]["thresholds"]
    browser.js("s = document.querySelector('[data-threshold] select'); s.value = '2'")
    browser.js("s.dispatchEvent(new Event('change'))")
    right, wrong = (model["classes"][2][k][50] for k in ("right", "wrong"))
    text = browser.js("document.querySelector('[data-threshold] .out').textContent")
    assert f"({right} right, {wrong} wrong, {model['objects'][2] - right:.0f} missed)" in text


def test_a_class_can_be_drawn_over_the_curves(browser):
    choose = "s = document.querySelector('[data-curve]'); s.value = '{}'; s.dispatchEvent(new Event('change'))"
    browser.js(choose.format(0))
    assert browser.js("document.querySelectorAll('.plot .chosen').length") == 1
    browser.js(choose.format(1))
    assert browser.js("document.querySelectorAll('.plot .chosen').length") == 1
    browser.js(choose.format(""))
    assert browser.js("document.querySelectorAll('.plot .chosen').length") == 0


def test_pictures_load_and_open_in_place_and_step_by_keys(browser):
    assert browser.js("document.querySelectorAll('img[loading=lazy]').length") > 10
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.js("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
    browser.wait_for("[...document.images].filter(i => i.src).every(i => i.complete)")
    assert browser.js("[...document.images].filter(i => i.id !== 'large' && i.naturalWidth === 0).length") == 0
    browser.js("document.querySelector('a.zoom').click()")
    browser.wait_for("document.getElementById('large').naturalWidth > 0")
    first = browser.js("document.getElementById('large').src")
    browser.press("ArrowRight", 39)
    assert browser.js("document.getElementById('large').src") != first
    browser.press("ArrowLeft", 37)
    assert browser.js("document.getElementById('large').src") == first
    browser.press("Escape", 27)
    browser.wait_for("!document.getElementById('viewer').open")


def test_mistakes_lead_to_the_whole_image(browser):
    links = browser.js("[...document.querySelectorAll('#mistakes-1 figcaption a')].map(a => [a.hash, a.innerText])")
    assert links
    names = "[...document.querySelectorAll('#mistakes-1 figcaption')].filter(c => c.querySelector('a'))"
    for k, (target, _) in enumerate(links):
        whole = browser.js(f"document.querySelector('{target} figcaption').textContent")
        file = browser.js(f"{names}[{k}].firstChild.textContent").split(" – ")[-1].strip()
        assert whole.startswith(f"{file} (id ")


def test_hostile_names_are_text(browser):
    assert any(HOSTILE.format(1) == text for text in column(browser, 0))
    assert browser.js("document.querySelectorAll('main b b, main svg[onload], main u, main img[src=x]').length") == 0
    assert browser.js("document.title").endswith("<i>truth</i>")


def test_the_tables_are_there_without_scripts(page):
    with Browser(1400, 900) as browser:
        browser.without_scripts()
        browser.open(page)
        browser.without_scripts(False)  # to look at it; the page's own script has not run
        assert browser.js("document.documentElement.className") == ""
        assert browser.js("document.querySelectorAll('#classes-1 tbody tr').length") == 7
        assert browser.js("getComputedStyle(document.querySelector('.js')).display") == "none"
        assert browser.problems == []


def test_text_stands_out_in_light_and_dark(page):
    with Browser(800, 600) as browser:
        for dark in (False, True):
            browser.dark(dark)
            browser.open(page)
            for colour in ("--fg", "--mute", "--main", "--good", "--bad"):
                assert contrast(browser, colour) >= 4.5, (colour, dark)


def contrast(browser, name):
    """WCAG 2's contrast of a colour of the page with its background."""
    values = browser.js(
        "(n => [n, '--bg'].map(v => { const e = document.createElement('i'); e.style.color = `var(${v})`;"
        " document.body.append(e); const c = getComputedStyle(e).color.match(/\\d+/g).map(Number); e.remove();"
        " return c; }))"
        f"('{name}')"
    )
    light = []
    for colour in values:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)
