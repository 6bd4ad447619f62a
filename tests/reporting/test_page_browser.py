"""The report's page in Chromium: what a reader does with it, by mouse, by keys, on a phone; nothing asks a network."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
import sweep

from tofu.evaluation import logs
from tofu.reporting import grouping, results, site

for package in ("pandas", "matplotlib", "itables", "plotly", "jinja2"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update")
HOSTILE = "He wrote </script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'> & more"
LOUD, QUIET = "forget10_npo_0.0001_seed1/eval_forget10", "forget10_npo_1e-05_seed1/eval_forget10"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        one = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield one
        one.close()


@pytest.fixture
def visit(browser):
    """Open a page; when the test ends, it has said no error and asked nobody else for anything."""
    contexts, said, asked = [], [], []

    def open_one(url: str, **options):
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, "offline": True, **options})
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.on("request", lambda request: asked.append(request.url))
        context.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        context.on("weberror", lambda error: said.append(str(error.error)))
        page = context.new_page()
        page.goto(url)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield open_one
    for context in contexts:
        assert not any(page.evaluate("window.pwned") for page in context.pages)
        context.close()
    assert said == []
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def write_page(out: Path, top: Path) -> str:
    """A report's page of all results below a folder; its address."""
    found = results.collect([top])
    out.mkdir()
    site.write(out, {"save_dir": str(out)}, found, grouping.metrics_of(found.runs))
    return (out / site.PAGE).as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Two methods, two rates, with checkpoints; what one model wrote holds markup."""
    top = tmp_path_factory.mktemp("page")
    sweep.sweep(top / "runs", splits=("forget10",), methods=("grad_ascent", "npo"), rates=(1e-4, 1e-5), seeds=(1, 2))
    file = top / "runs" / LOUD / logs.AGGREGATED
    log = json.loads(file.read_text())
    log["eval_log_forget.json"]["generated_text"]["3"][1] = HOSTILE
    file.write_text(json.dumps(log))
    return write_page(top / "report", top / "runs")


def column(page, n: int) -> list[str]:
    return page.locator(f"#table tbody tr td:nth-child({n})").all_inner_texts()


def shown(page) -> int:
    """How many runs the table has after search and filters."""
    return int(page.locator(".dt-info").inner_text().split(" of ")[1].split()[0])


def focused(page, what: str = "textContent") -> str:
    return page.evaluate(f"document.activeElement.{what}")


def wait(page, condition: str) -> None:
    """Until it holds: Playwright's own `wait_for_function` asks by `eval`, which the page's policy forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def test_sorted_filtered_searched(visit, address):
    """Every way to find a run, one after another, and what a number is made of."""
    page = visit(address)
    names = page.locator("#table thead tr:first-child th").all_inner_texts()
    utility = names.index("Model Utility ↑") + 1
    page.locator(f"#table thead th:nth-child({utility}) .dt-column-order").click()
    values = [float(text) for text in column(page, utility)]
    assert values == sorted(values) and len(values) == 25
    assert shown(page) == 35
    page.get_by_label("Search all runs").fill("seed2 npo")
    assert shown(page) == 8 and all("npo" in name and "seed2" in name for name in column(page, 1))
    middle = statistics.median(map(float, column(page, utility)))
    page.get_by_title("Filter Model Utility").fill(str(middle))
    page.get_by_title("Filter Model Utility").locator("xpath=..").locator("select").select_option("greater")
    assert 0 < shown(page) < 8 and all(float(text) > middle - 1e-3 for text in column(page, utility))
    page.get_by_role("button", name="Reset", exact=True).click()
    page.wait_for_selector("html[data-ready]", state="attached")
    page.get_by_role("button", name="Values of method").click()
    page.locator(".dtcc-list").get_by_role("button", name="finetuned").click()
    page.keyboard.press("Escape")
    assert shown(page) == 1 and column(page, 1) == ["full/eval_forget10"]
    page.get_by_role("button", name="Values of method").click()
    page.locator(".dtcc-list").get_by_text("Deselect").click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Values of lr").click()
    page.locator(".dtcc-list").get_by_role("button", name="1e-5").click()
    page.keyboard.press("Escape")
    assert shown(page) == 16 and set(column(page, names.index("lr") + 1)) == {"1e-5"}
    page.get_by_role("button", name="Reset", exact=True).click()
    page.wait_for_selector("html[data-ready]", state="attached")
    page.get_by_label("Search all runs").fill("repeats itself")
    assert shown(page) == 2, "a search finds what no column shows"
    page.get_by_role("button", name="Values of state").click()
    assert "† collapsed" in page.locator(".dtcc-list").inner_text()
    page.keyboard.press("Escape")
    page.get_by_label("Search all runs").fill("collapsed")
    assert shown(page) == 2 and page.locator("tr.collapsed td", has_text="† collapsed").count() == 2


@pytest.mark.slow
def test_columns_chosen_by_hand_and_a_link_that_keeps_everything(visit, address):
    page = visit(address)
    page.get_by_role("button", name="Columns", exact=True).click()
    page.get_by_label("Mem", exact=True).check()
    page.get_by_label("seed", exact=True).check()
    page.get_by_label("log10 Forget Quality", exact=True).uncheck()
    page.keyboard.press("Escape")
    names = page.locator("#table thead tr:first-child th").all_inner_texts()
    assert "Mem ↑" in names and "seed" in names and "log10 Forget Quality ↑" not in names
    place = names.index("Model Utility ↑") + 1
    for _ in range(2):
        page.locator(f"#table thead th:nth-child({place}) .dt-column-order").click()
    page.get_by_title("Filter seed").fill("2")
    page.get_by_label("Search all runs").fill("npo")
    rows = column(page, 1)
    page.locator("button.open").nth(1).click()
    page.wait_for_selector("#rows [aria-selected=true]")
    page.keyboard.press("j")
    page.wait_for_selector("#rows [aria-selected=true]:nth-child(2)")
    other = visit(page.url)
    other.wait_for_selector(".card.after .text")
    assert other.locator("#browser-title").inner_text() == rows[1]
    assert other.locator("#texts h3").inner_text() == "Forget 1"
    other.keyboard.press("Escape")
    assert other.locator("#table thead tr:first-child th").all_inner_texts() == names
    assert column(other, 1) == rows and shown(other) == 8
    assert other.get_by_title("Filter seed").input_value() == "2"
    assert "run=" not in other.url and "search=npo" in other.url


def test_a_link_within_the_page_keeps_the_state(visit, address):
    """It goes to the part, by mouse and by keys; search and address stay, and nothing is loaded again."""
    page = visit(address)
    page.get_by_label("Search all runs").fill("npo")
    page.wait_for_url("**#search=npo")
    kept = page.url
    page.evaluate("window.same = true")
    for name, part in (("Figures", "figures"), ("Notes", "notes"), ("Runs", "runs")):
        page.get_by_role("link", name=name, exact=True).click()
        assert focused(page, "id") == part and page.evaluate("location.href") == kept
        wait(page, f"document.getElementById('{part}').getBoundingClientRect().top < innerHeight")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert focused(page, "id") == "runs"
    page.evaluate("location.hash = 'figures'")  # as if it was typed into the address
    page.wait_for_url(kept)
    assert focused(page, "id") == "figures" and page.evaluate("window.same") and shown(page) == 16
    page.keyboard.press("Tab")
    assert page.evaluate("!!document.activeElement.closest('#figures, #notes')")


def test_a_number_leads_to_its_file(visit, address):
    page = visit(address)
    link = page.locator("#table tbody td a").first
    exact = float(link.get_attribute("title").split("\n")[0])
    link.click()
    page.wait_for_url("**/metrics.json")
    text = page.locator("body").inner_text()
    assert exact in {one["value"] for one in json.loads(text).values()}


def test_a_generation(visit, address):
    """Texts of all models side by side, what differs marked, found in all opened runs; markup stays text."""
    page = visit(address)
    page.get_by_label("Search all runs").fill("npo final")
    page.get_by_role("button", name=LOUD).click()
    page.locator("#rows [role=option]", has_text="Forget 3 ").click()
    cards = {name: page.locator(f".card.{name}") for name in ("truth", "before", "after", "retain")}
    assert cards["truth"].locator(".text").inner_text() == "It is so."
    assert cards["after"].locator(".text").inner_text() == HOSTILE
    assert cards["before"].locator("small").inner_text() == "full/eval_forget10"
    assert cards["retain"].locator("small").inner_text() == "retain90/eval_forget10"
    assert cards["after"].locator("mark").count() and not cards["before"].locator("mark").count()
    page.get_by_label("Mark what differs from").select_option("after")
    assert cards["before"].locator("mark").all_inner_texts() == ["It is so"]
    assert not cards["after"].locator("mark").count()
    page.get_by_role("button", name="Close Esc").click()
    page.get_by_role("button", name=QUIET).click()
    assert page.locator("#texts h3").inner_text() == "Forget 3", "the row stays, so that runs can be compared"
    page.get_by_label("Search the opened runs").fill("wrote <")
    page.wait_for_selector("#count:has-text('1 row in 2 opened runs')")
    assert page.locator("#browser-title").inner_text() == LOUD
    page.get_by_label("Search the opened runs").fill("no such words")
    page.wait_for_selector("#texts:has-text('No row matches')")
    page.get_by_label("Search the opened runs").fill("")
    page.wait_for_selector("#count:has-text('48 rows')")
    page.locator("#set").select_option("Real World")
    assert page.locator("#rows [role=option]").count() == 12


@pytest.mark.slow
def test_by_keys_alone(visit, address):
    """Search, go down, open, next row, next run, search there, close; every control can be reached and is seen."""
    page = visit(address)
    page.keyboard.press("/")
    assert focused(page, "ariaLabel") == "Search all runs"
    page.keyboard.type("seed1 1e-05 final")
    assert shown(page) == 2
    page.keyboard.press("Tab")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert focused(page) == QUIET
    page.keyboard.press("Enter")
    page.wait_for_selector("#rows [aria-selected=true]")
    assert page.locator("#browser-title").inner_text() == QUIET
    for key in ("j", "ArrowDown", "k"):
        page.keyboard.press(key)
    assert page.locator("#texts h3").inner_text() == "Forget 1"
    page.keyboard.press("p")
    page.wait_for_selector("#browser-title:has-text('grad_ascent')")
    page.keyboard.press("n")
    page.wait_for_selector(f"#browser-title:has-text('{QUIET}')")
    page.keyboard.press("/")
    page.keyboard.type("so")
    assert focused(page, "id") == "find"
    page.wait_for_selector("#count:has-text('96 rows in 2 opened runs')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#count:text-is('48 rows')")
    assert page.locator("#browser").is_visible() and focused(page, "id") == "rows"
    page.keyboard.press("j")
    assert page.locator("#texts h3").inner_text() == "Forget 2" and not page.locator("#find").input_value()
    page.keyboard.press("Escape")
    page.wait_for_selector("#browser", state="hidden")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    seen = set()
    controls = page.evaluate(
        "[...document.querySelectorAll('main button, main input, main a, main select, nav *, .dt-column-order')]"
        ".filter(e => e.matches('button,input,a,select,[tabindex]') && e.checkVisibility({visibilityProperty: true})"
        " && !e.closest('.plot') && !e.disabled && e.tabIndex >= 0).map((e, i) => e.dataset.control = i)"
    )
    for _ in range(len(controls) + 60):
        page.keyboard.press("Tab")
        state = page.evaluate(
            "[document.activeElement.dataset.control, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if state[0] is not None:
            seen.add(int(state[0]))
            assert state[1] != "none", focused(page, "outerHTML")
    assert seen == set(controls)


@pytest.mark.slow
def test_figures(visit, address):
    """Each is drawn when it comes into view; hover says which run a point is, a click opens it."""
    page = visit(address)
    for name in ("tradeoff", "utility", "truth_ratios", "over_steps", "aggregates", "rates"):
        page.locator(f".plot[data-name={name}]").scroll_into_view_if_needed()
        page.locator(f".plot[data-name={name}][data-drawn]").wait_for()
    assert "no model was asked in two ways" in page.locator(".missing").inner_text()
    page.locator("figure").first.scroll_into_view_if_needed()
    box = page.locator("figure").first.locator(".scatterlayer .points path").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    hover = page.locator("figure .hoverlayer").first
    hover.wait_for(state="attached")
    wait(page, "document.querySelector('.hoverlayer').textContent.includes('method')")
    name = next(
        run
        for run in page.evaluate("[...JSON.parse(document.getElementById('data').textContent).runs].map(r => r.name)")
        if (hover.text_content() or "").startswith(run)
    )
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector("#browser[open]")
    assert page.locator("#browser-title").inner_text().removesuffix(" † collapsed") == name
    page.keyboard.press("Escape")
    select = page.locator("figure", has_text="optimiser steps").get_by_label("Metric")
    select.select_option("ROUGE Forget")
    page.wait_for_selector("figure .ytitle:has-text('ROUGE Forget')")


@pytest.mark.slow
def test_on_paper(visit, address, tmp_path):
    """All figures are drawn and the table is as wide as the paper, in light colours; the screen is then as it was."""
    page = visit(address, color_scheme="dark")
    drawn = "document.querySelectorAll('.plot[data-drawn]').length"
    right = "Math.round(document.querySelector({}).getBoundingClientRect().right)"
    table, figure, paper = (right.format(f"'{of}'") for of in ("#table", ".plot .main-svg", "body"))
    ink = "getComputedStyle(document.body).color"
    page.evaluate(
        f"addEventListener('beforeprint', () => {{ window.seen = [{drawn}, {table}, {figure}, {paper}, {ink}]; }})"
    )
    wide = page.evaluate(table)
    page.wait_for_selector("html.printable", state="attached")
    page.pdf(path=tmp_path / "page.pdf")
    figures, table_right, figure_right, paper_right, colour = page.evaluate("window.seen")
    assert figures == page.locator(".plot").count() == 6
    assert wide > 900 and max(table_right, figure_right) <= paper_right <= 670, "17.5 cm, at 96 pixels an inch"
    assert colour == "rgb(28, 28, 28)"
    wait(page, f"{ink} === 'rgb(232, 232, 232)' && {table} === {wide}")
    fits = "e => e.querySelector('.main-svg').clientWidth === e.clientWidth"
    wait(page, f"[...document.querySelectorAll('.plot')].every({fits})")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone(visit, address, dark):
    """390 px: the table scrolls in itself and the page does not; dark where the system is, and by the switch."""
    options = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page = visit(address, **options, color_scheme="dark" if dark else "light", reduced_motion="reduce")
    wide = "document.documentElement.scrollWidth <= innerWidth"
    paper = "getComputedStyle(document.body).backgroundColor"
    first = page.evaluate(paper)
    assert page.evaluate(wide) and (first == "rgb(22, 24, 28)") == dark
    assert page.evaluate(
        "(e => e.scrollWidth > e.clientWidth)(document.querySelector('.dt-layout-table .dt-layout-cell'))"
    )
    cut = "[...document.querySelectorAll('button.open')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate(cut) == 0, "names that begin alike are seen to their ends"
    page.locator("figure").first.scroll_into_view_if_needed()
    page.locator(".plot[data-name=tradeoff][data-drawn]").wait_for()
    assert page.evaluate(wide)
    page.get_by_role("button", name="Light / dark").click()
    assert page.evaluate(paper) != first
    page.locator("button.open").first.click()
    page.wait_for_selector(".card.after .text")
    assert page.evaluate("(e => e.scrollWidth <= innerWidth)(document.getElementById('browser'))") and page.evaluate(
        wide
    )


@pytest.mark.slow
def test_500_runs_of_400_rows(visit, tmp_path):
    """At most 60 MB; usable within 2 s, a filter within 100 ms, a run's generations within 500 ms."""
    assert sweep.many(tmp_path / "runs", 500, 400) == 500
    address = write_page(tmp_path / "report", tmp_path / "runs")
    assert (tmp_path / "report" / site.PAGE).stat().st_size <= 60e6
    page = visit(address)
    ready = []
    for _ in range(3):
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        ready.append(page.evaluate("performance.getEntriesByName('ready')[0].startTime"))
    assert shown(page) == 500
    timed = """async ([label, text]) => {
        const input = document.querySelector(label), start = performance.now();
        input.value = text;
        input.dispatchEvent(new Event("input", { bubbles: true }));
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        return performance.now() - start;
    }"""
    filters = [page.evaluate(timed, ["[title='Filter run']", text]) for text in ("npo", "rmu", "seed3", "KL", "idk")]
    assert shown(page) == 62
    page.evaluate(timed, ["[title='Filter run']", ""])
    searches = [page.evaluate(timed, [".dt-search input", text]) for text in ("npo", "rmu", "seed3", "KL", "")]
    opened = """async (n) => {
        const button = document.querySelectorAll("button.open")[n], start = performance.now();
        button.click();
        const done = () => document.getElementById("browser-title").textContent.startsWith(button.textContent)
            && document.querySelector(".card.after .text");
        while (!done() && performance.now() < start + 20000) await new Promise((next) => setTimeout(next));
        return performance.now() - start;
    }"""
    opens = []
    for n in range(1, 6):
        opens.append(page.evaluate(opened, n))
        page.keyboard.press("Escape")  # the next one is opened at once, before the browser has said that this is closed
    assert page.locator("#rows [role=option]").count() == 400
    found = {
        name: statistics.median(of)
        for name, of in (("ready", ready), ("filter", filters), ("search", searches), ("open", opens))
    }
    assert found["ready"] <= 2000 and max(found["filter"], found["search"]) <= 100 and found["open"] <= 500, found
