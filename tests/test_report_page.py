"""The page of a report in a real browser: tables that sort and filter, figures that tell, names that are only names."""

import os

import pytest
from test_report import make_study, places_of, two_factors

from tl_jax.core.files import read_json, write_json
from tl_jax.studies.report import report

HOSTILE = (
    "<script>document.title='taken'</script>",
    "\"'><img src=x onerror=\"document.title='taken'\">",
    "</title></style></script><b>&amp;${x}`",
    "two\nlines <!-- \\",
    "no\udcffutf8",
)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(filter(os.path.exists, ("/usr/bin/chromium-headless-shell", "/usr/bin/chromium")), None)
    if not browser:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        yield found
        found.close()


def opened(chromium, workdir, width=1280, **options):
    """The page of a report, and what went wrong on it: messages, errors and requests for anything but itself."""
    page, trouble = chromium.new_page(viewport={"width": width, "height": 800}, **options), []
    address = (workdir / "report.html").as_uri()
    for event, told in (("console", "text"), ("pageerror", "message"), ("dialog", "message"), ("request", "url")):
        page.on(event, lambda found, told=told: trouble.append(getattr(found, told)))
    page.goto(address)
    trouble[:] = [each for each in trouble if each != address and not each.startswith("data:image/png;base64,")]
    return page, trouble


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = two_factors(tmp_path_factory.mktemp("page") / "w")
    report.write(workdir)
    return workdir


def column(table, index):
    return table.locator(f"tbody tr:not([hidden]) td:nth-child({index + 1})").all_inner_texts()


def value(text):
    """What "1,000", "12.3 G", "13.5 s" or "0.12" is worth."""
    number, _, unit = text.partition(" ")
    return float(number.replace(",", "")) * 1000.0 ** " kMGTP".index(unit.strip("s") or " ")


@pytest.mark.slow
def test_tables_sort_as_numbers_and_stable_by_mouse_and_keyboard_and_filter(chromium, workdir):
    page, trouble = opened(chromium, workdir)
    cost = page.locator("table").filter(has_text="Means over the finished runs")
    buttons, names = cost.locator("th button"), column(cost, 0)
    for i in (1, 3, 5, 9):  # parameters, FLOPs, seconds and a ratio
        before = column(cost, i)
        down = sorted(before, key=value, reverse=True)
        for turn, expected in (("ascending", sorted(before, key=value)), ("descending", down), ("none", before)):
            buttons.nth(i).click() if i == 1 else buttons.nth(i).press("Enter")
            assert cost.locator("th").nth(i).get_attribute("aria-sort") == turn and column(cost, i) == expected
        assert column(cost, 0) == names and cost.locator("[aria-sort=none]").count() == buttons.count()
    buttons.nth(0).click()
    by_name = column(cost, 0)
    assert by_name[:2] == ["method=50%_a&b, shots=5", "method=50%_a&b, shots=50"]
    buttons.nth(1).click()  # equal numbers of parameters keep the order of names
    parameters = dict(zip(column(cost, 0), map(value, column(cost, 1)), strict=True))
    assert column(cost, 0) == sorted(by_name, key=parameters.get) != by_name
    assert "\u25b2" in buttons.nth(1).evaluate("node => getComputedStyle(node, '::after').content")
    buttons.nth(1).press("Enter"), buttons.nth(1).press("Enter")
    field, rows = page.locator("input[aria-label*='Means over the finished']"), page.locator("tbody tr:not([hidden])")
    others = rows.count() - len(names)
    expected = {"shots=5": names[::2], "PROBE shots=50": names[3:4], "1,000,000": names[:2], "no such": [], "": names}
    for text, shown in expected.items():
        field.fill(text)
        told = f"{len(shown)} of {len(names)} rows" if text else ""
        assert column(cost, 0) == shown and rows.count() == others + len(shown)
        assert field.locator("xpath=following-sibling::output").inner_text() == told
    assert names[3] == "method=probe, shots=50" and not trouble


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 360])
def test_figures_tell_the_point_under_the_pointer_and_by_arrow_keys(chromium, workdir, width):
    page, trouble = opened(chromium, workdir, width, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = places_of((workdir / "report.html").read_text())
    for name in ("cells", "learning", "training", "calibration"):
        plot = page.locator(f"[id='figure-{name}'] .plot")
        tip = plot.locator("[role=status]")
        assert not tip.is_visible()
        for right, down, text in found[name][:: max(1, len(found[name]) // 4)]:
            plot.scroll_into_view_if_needed()
            plot.locator("xpath=..").evaluate("(node, x) => node.scrollLeft = x * node.scrollWidth - 160", right)
            box = plot.bounding_box()
            page.mouse.move(box["x"] + right * box["width"] + 1, box["y"] + down * box["height"] + 1)
            shown = tip.bounding_box()
            assert text in tip.inner_text().split("\n\n")
            assert box["x"] - 1 <= shown["x"] and shown["x"] + shown["width"] <= box["x"] + box["width"] + 1
        page.mouse.move(1, 1)
        assert not tip.is_visible()
        for key, place in (("ArrowRight", 0), ("ArrowDown", 1), ("ArrowLeft", 0), ("ArrowUp", -1)):
            plot.press(key)
            assert tip.inner_text() == found[name][place][2]
        plot.press("Escape")
        assert not tip.is_visible()
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(25, 25, 25)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(colour) == "rgb(255, 255, 255)" and not page.locator(".filter input").first.is_visible()
    assert not trouble


@pytest.mark.slow
def test_names_from_data_are_text_whatever_they_hold(chromium, tmp_path):
    factors = {HOSTILE[0]: {name: {} for name in HOSTILE[:4]}, HOSTILE[1]: {"1": {}, HOSTILE[2]: {}}}
    workdir = make_study(
        tmp_path / "w", factors, {HOSTILE[0]: HOSTILE[1]}, question=HOSTILE[1], classes=HOSTILE, names=("accuracy",)
    )
    write_json(workdir / "study.json", {**read_json(workdir / "study.json"), "name": HOSTILE[2]})
    summary = report.write(workdir)
    page, trouble = opened(chromium, workdir)
    assert page.title() == HOSTILE[2] and page.locator("h1").inner_text() == HOSTILE[2]
    assert page.locator("script").count() == 1 and page.locator("b").count() == 0
    assert page.locator("img").count() == len(summary["figures"]) == page.locator("img[src^='data:image/png']").count()
    levels = page.locator("table").first.locator("tbody td:nth-child(2)").all_text_contents()
    assert levels[:4] == [HOSTILE[0], f"{HOSTILE[1]} (baseline)", *HOSTILE[2:4]]
    plot, told = page.locator("[id='figure-classes'] .plot"), set()
    for _ in range(15):
        plot.press("ArrowRight")
        told.add(plot.locator("[role=status]").inner_text().split("\n")[0])
    assert told == {" ".join(name.replace("\udcff", r"\udcff").split()) for name in HOSTILE} and not trouble
    for tag, field, text in (("script", "textContent", "document.title = 1"), ("img", "src", "http://127.0.0.1:9/x")):
        with page.expect_console_message() as found:
            made = "Object.assign(document.createElement(tag), {[field]: text})"
            page.evaluate(f"([tag, field, text]) => document.body.append({made})", [tag, field, text])
        assert "Content Security Policy" in found.value.text and page.title() == HOSTILE[2]
