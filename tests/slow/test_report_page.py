"""The report page: every number beside its source, user text that stays text, nothing from the network; and in a browser, as a reader
meets it."""

import base64
import dataclasses
import json
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np
import pytest
from bs4 import BeautifulSoup
from test_explain import many
from test_explain import rows as hand_made_prototypes
from test_panel import support

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.errors import InputError
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.segmentation import Segmentation
from ovdiff_lib.types import PrototypeBank
from ovdiff_lib.workbench.figures import base as figures
from ovdiff_lib.workbench.page.page import STAMP, build_report, hidden, html_of
from ovdiff_lib.workbench.page.panel import panel_data, write_panel
from ovdiff_lib.workbench.tables import claims
from ovdiff_lib.workbench.tables.intervals import Runs
from ovdiff_lib.workbench.tables.paper import paper_cell
from ovdiff_lib.workbench.tables.tables import Cell, write_table

SCRIPT, QUOTED, ARABIC, EMOJI = "<script>window.pwned = 1</script>", "a \"b\" & 'c'", "كلب صغير", "🛋 \u202esofa"
NAMES = (SCRIPT, QUOTED, f"{ARABIC} {EMOJI}")
REMOTE, VOC = "https://example.org/tracker.png", "mini-voc (VOC)"
STAGE = ".two svg[role=application]"


def segmentation() -> Segmentation:
    """4 x 7 pixels decided by prototypes made by hand, some by a constant: background and two of three classes with hostile names."""
    vocabulary = Vocabulary(tuple(map(Category, NAMES)))
    bank = PrototypeBank(vocabulary, {"sd": (hand_made_prototypes(),) * 3}).restrict([0, 2])
    return dataclasses.replace(many()[0], vocabulary=vocabulary, bank=bank, filter_scores=np.array([0.6, 0.05, 0.35], np.float32))


def notebook(stem: str, outputs=()) -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook()
    made.cells = [nbformat.v4.new_markdown_cell(f"# All about {stem}\n\nWith $\\frac{{a}}{{b}}$, see [a page](https://example.org)."),
                  nbformat.v4.new_code_cell("import math\nprint(1)", execution_count=2, outputs=list(outputs))]
    return made


def display(**data):
    return nbformat.v4.new_output("display_data", data={name.replace("_", "/"): value for name, value in data.items()})


def fill(folder: Path) -> Path:
    """An outputs folder as a run leaves it, and the stripped notebooks beside it; returns the latter's folder."""
    profile = load_profile("mini")
    cells = [Cell.of(row, VOC, values, paper_cell("1", row, "VOC"), Runs(VOC, np.array([[[[v], [100], [100]]] * 9 for v in values])))
             for row, values in {"OVDiff": [50.0, 52.0, 51.0], "MaskCLIP": [10.0, 11.0, 12.0]}.items()]
    cells = [*cells, Cell("TCL", VOC, paper=paper_cell("1", "TCL", "VOC"), source="published")]
    write_table(folder / "tables" / "05_main_results.csv", "05_main_results", cells, profile, "mIoU of $\\frac{a}{b}$.", title="Table 1",
                details={"images": 211, "seeds": [0, 1, 2]})
    hostile = [Cell(name, column, float(i)) for i, name in enumerate(NAMES) for column in (SCRIPT, "images")]
    write_table(folder / "tables" / "05_main_results_names.csv", "05_main_results_names", hostile, profile, f"Caption {SCRIPT}.",
                {"images": 0}, title=SCRIPT, details={SCRIPT: SCRIPT, "volatile": True})
    claims.write_claims(folder)
    sketch = figures.image_grid([[np.zeros((20, 30, 3), np.uint8)] * 5], ["row"], list("abcde"))
    figures.save_figure(sketch, folder / "figures" / "05_main_results_grid.png", f"Five pictures of {SCRIPT} and {EMOJI}.")
    write_panel(folder / "explain" / "06_explainability_panel.json",
                panel_data({f"one {SCRIPT}": segmentation(), "two": segmentation()}, map(support, NAMES), profile.filters, f"On {SCRIPT}."))
    outputs = [nbformat.v4.new_output("stream", name="stderr", text="first draft\rfinal text\n"),
               nbformat.v4.new_output("stream", name="stdout", text=f"in {folder.resolve()}/tables {SCRIPT}\n"),
               display(text_markdown=f"| class |\n|---|\n| {SCRIPT} |\n| <img src='{REMOTE}'> |", text_plain="text"),
               display(text_html=f"<b>bold</b><script>window.pwned = 2</script><img src='{REMOTE}' onerror='window.pwned = 3'>"),
               display(application_javascript="window.pwned = 4", text_plain="plain")]
    nbformat.write(notebook("main results", outputs), folder / "05_main_results.ipynb")
    stamp = {"seconds": 192.4, "finished": "2025-01-02 03:04:05"}
    (folder / "05_main_results.stamp.json").write_text(json.dumps(stamp))
    (folder / "06_explainability.failed.ipynb").write_text("{")
    sources = folder.parent.parent / "notebooks"
    sources.mkdir(exist_ok=True)
    for stem in ("05_main_results", "06_explainability", "07_in_the_wild"):
        nbformat.write(notebook(stem), sources / f"{stem}.ipynb")
    return sources


class Page(BeautifulSoup):
    """A page, read as a reader does: by section and row."""

    def __init__(self, path: Path) -> None:
        self.file = path.read_text(encoding="utf-8")
        super().__init__(self.file, "html.parser")

    def said(self, section: str) -> str:
        """The text of a section, blanks made one."""
        return " ".join(self.find(id=section).get_text(" ").split())

    def row(self, section: str, name: str) -> list[str]:
        """The cells of a row of a section's table by its first."""
        rows = ([" ".join(c.get_text(" ").split()) for c in row.find_all(["th", "td"])] for row in self.find(id=section).find_all("tr"))
        return next(cells[1:] for cells in rows if cells[0] == name)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(outputs folder, path of the page, the page)."""
    folder = tmp_path_factory.mktemp("project") / "outputs" / "mini"
    path = build_report(folder, load_profile("mini"), fill(folder))
    return folder, path, Page(path)


def test_every_table_and_figure_is_there_whole_with_its_caption_and_source(built):
    folder, _, page = built
    assert page.row("table-05_main_results", "OVDiff") == ["51.0 [48.8, 53.2]", "66.3 ± 0.2"]
    assert page.row("table-05_main_results", "TCL") == ["published", "51.2"]
    assert page.row("table-05_main_results_names", QUOTED) == ["1.0", "1"]  # no column for a paper; digits as the notebook asked
    assert "<mfrac>" in page.file and "These numbers vary from run to run" in page.said("table-05_main_results_names")
    assert {a["download"] for a in page.find_all("a", download=True)} == {p.name for p in (folder / "tables").glob("05*.csv")}
    for link in page.find_all("a", download=True):
        assert base64.b64decode(link["href"].partition(",")[2]) == (folder / "tables" / link["download"]).read_bytes()
    (image,) = page.find_all("img")
    assert base64.b64decode(image["src"].partition(",")[2]) == (folder / "figures" / "05_main_results_grid.png").read_bytes()
    assert f"Five pictures of {SCRIPT} and {EMOJI}." in page.said("figure-05_main_results_grid") and image["alt"]
    text = page.said("run-05_main_results")
    assert "All about main results" in text and "0:03:12" in text and "2025-01-02 03:04:05" in text
    assert load_profile("mini").digest() in text and "seeds 0 to 2" in text


def test_claims_are_counted_and_listed_and_comparisons_are_stamped(built, tmp_path):
    folder, _, page = built
    judged = claims.judge(folder)
    counts = claims.counts(judged)
    assert counts["holds"] > 0 and f"{counts['holds']} of the paper’s {len(judged)} claims hold here" in page.said("claims")
    for claim in judged:
        cells = page.row("claims", str(claim.id))
        assert claim.claim in cells[0] and claim.note in cells[4]
        assert cells[1:4] == [claim.verdict, claim.paper, claim.measured or "–"]
    assert f"mini: {STAMP}" in page.said("claims")
    shutil.copytree(folder, tmp_path / "paper")
    profile = load_profile("paper", {"support.size": 5})
    paper = Page(build_report(tmp_path / "paper", profile, tmp_path / "none"))
    assert STAMP not in paper.file and "66.3" in paper.said("table-05_main_results")
    made = paper.said("provenance")
    assert profile.digest() in made and "size: 5 " in made and f"torch {version('torch')}" in made


def test_tables_without_their_notebook_are_still_shown_and_an_empty_folder_gives_a_page(built, tmp_path):
    folder = built[0]
    shutil.copytree(folder / "tables", tmp_path / "mini" / "tables")
    page = Page(build_report(tmp_path / "mini", load_profile("mini"), folder.parent.parent / "notebooks"))
    assert "of an earlier run" in page.said("run-05_main_results") and "51.0" in page.said("table-05_main_results")
    without = Page(build_report(tmp_path / "mini", load_profile("mini"), tmp_path / "none"))
    assert "51.0" in without.said("run-others") and "has not run in this folder" in without.said("explain")
    shutil.rmtree(tmp_path / "mini" / "tables")
    assert "0 of the paper’s" in Page(build_report(tmp_path / "mini", load_profile("mini"), tmp_path / "none")).said("claims")
    with pytest.raises(InputError, match="ovdiff reproduce"):
        build_report(tmp_path / "none", load_profile("mini"), tmp_path)


def test_what_failed_is_missing_or_broken_is_a_sentence_and_the_rest_is_shown(built, tmp_path):
    missing = built[2].said("missing")
    assert "The last run of 06_explainability failed; its error stands in 06_explainability.failed.ipynb." in missing
    assert "The notebook 07_in_the_wild has not been run in this folder" in missing and "05_main_results" not in missing
    folder = tmp_path / "mini"
    shutil.copytree(built[0], folder)
    (folder / "tables" / "05_main_results_a.csv").write_text("torn,")
    (folder / "tables" / "05_main_results_b.json").write_text("{")
    for name in "bc":
        shutil.copy(folder / "tables" / "05_main_results.csv", folder / "tables" / f"05_main_results_{name}.csv")
    (folder / "explain" / "06_torn.json").write_text("{")
    (folder / "05_main_results.stamp.json").write_text('{"parameters": ')
    (folder / "05_main_results.ipynb").write_text('{"cells": 3}')
    (folder / "08_cost.ipynb").write_text(json.dumps({"cells": [{"cell_type": "nonsense"}], "metadata": {}}))
    (folder / "report" / "notebooks" / "04_old.html").write_text("old")
    page = Page(build_report(folder, load_profile("mini"), tmp_path))
    missing = page.said("missing")
    for words in ("05_main_results_a.csv cannot be read as a table", "05_main_results_b.json cannot be read as JSON",
                  "05_main_results_c.csv has no Markdown beside it",
                  "06_torn.json is no explain panel", "05_main_results.ipynb cannot be read as a notebook",
                  "executed notebook 08_cost.ipynb cannot be shown"):
        assert words in missing, words
    assert "claims could not be judged" in page.said("claims") and str(folder) not in page.file
    assert "51.0" in page.said("table-05_main_results") and "Five pictures" in page.said("figure-05_main_results_grid")
    assert not (folder / "report" / "notebooks").exists()  # pages of notebooks that are gone go


def test_nothing_is_loaded_from_anywhere_and_no_folder_leaks(built):
    folder, path, page = built
    for element in page.find_all(True):
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            address = element.get(name, "data:")
            inner = element.name == "a" and (address.startswith("#") or address == "notebooks/05_main_results.html")
            assert inner or address.startswith("data:"), address
    assert (path.parent / "notebooks" / "05_main_results.html").exists()
    for file in (path, *path.parent.glob("notebooks/*.html")):
        text = file.read_text(encoding="utf-8")
        assert "@import" not in text and "url(" not in text and "default-src 'none'; img-src data:;" in text
        assert str(folder.resolve()) not in text and str(Path.home()) + "/" not in text
    ids = [element["id"] for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.find_all("a") if a["href"].startswith("#")} <= set(ids)


def test_text_from_data_is_escaped(built):
    page = built[2]
    assert [s.get("id") for s in page.find_all("script")] == ["panel-0", None] and "<script>window" not in page.file
    assert json.loads(page.find(id="panel-0").string)["images"][0]["classes"][1:] == list(NAMES)
    assert page.row("table-05_main_results_names", SCRIPT) == ["0.0", "0"] and ARABIC in page.file
    assert "$\\frac$" in html_of("$\\frac$")  # no formula after all


def test_a_notebook_page_shows_its_cells_and_may_run_nothing(built):
    folder, path, _ = built
    text = (path.parent / "notebooks" / "05_main_results.html").read_text(encoding="utf-8")
    assert "All about main results" in text and "<mfrac>" in text
    assert "final text" in text and "first draft" not in text  # as a terminal ends
    assert "in ../outputs/mini/tables &lt;script&gt;" in text
    assert "<td>&lt;script&gt;window.pwned = 1&lt;/script&gt;</td>" in text  # raw HTML in Markdown stays text
    assert "script-src" not in text and "default-src 'none'" in text
    assert 'href="../index.html"' in text and "mathjax" not in text.lower() and "cdnjs" not in text
    text = f'{folder}/tables and {Path(np.__file__).parent}/a.py and {Path.home()}/b "{folder}"'
    assert hidden(text, folder) == '../outputs/mini/tables and site-packages/numpy/a.py and ~/b "../outputs/mini"'


# ---- in a browser

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; pip install selenium")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip("no chromium and chromedriver on this machine; install both to test the page in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
                   "--no-first-run", f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "--window-size=1280,900"):
        options.add_argument(option)
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


def at(browser, selector):
    return browser.find_element("css selector", selector)


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(condition)


def opened(browser, path):
    """Load a page; returns what was requested and what the console said."""
    for log in ("performance", "browser"):
        browser.get_log(log)
    browser.get(path.as_uri())
    if "index" in path.name:
        wait(browser, lambda b: b.find_elements("css selector", ".panel[data-ready=true]"))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    # The browser notes what a page asks for before its content policy says no.
    refused = {m["params"]["requestId"] for m in messages if m["params"].get("blockedReason") == "csp"}
    requested = [m["params"]["request"]["url"] for m in messages
                 if m["method"] == "Network.requestWillBeSent" and m["params"]["requestId"] not in refused]
    return requested, [entry["message"] for entry in browser.get_log("browser")]


def check_told(browser, row, column):
    """What the panel shows of a pixel of its first image against explain()."""
    why = segmentation().explain(row, column)
    at_row, prototype, second = (at(browser, f"[role=status] {part}").text for part in ("h4", ".prototype", ".second"))
    assert at_row == f"{why.class_name} at row {row}, column {column}"
    if why.kind is None:
        assert prototype == "A constant background score, no prototype."
    else:
        assert f"{why.kind} prototype" in prototype and f"(number {why.index}, features of sd)" in prototype
        assert ("background" in prototype) == (why.region == "background") and why.category in prototype
    assert second.startswith(f"Runner-up: {why.runner_up}, ")
    assert float(re.search(r"([\d.]+) behind", second)[1]) == pytest.approx(why.margin, abs=0.00051)
    regions = browser.find_elements("css selector", "li svg")
    assert [r.get_attribute("aria-label") for r in regions] == [
        f"Support image {n}: {mask.sum()} of 6 features" for n, mask in zip(why.images, why.masks, strict=True)]
    for region, mask in zip(regions, why.masks, strict=True):
        pale = region.find_elements("css selector", "path")[0].get_attribute("d")
        assert {(int(y), int(x)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", pale)} == set(zip(*np.nonzero(~mask), strict=True))


def test_the_pages_open_from_disk_alone_and_run_nothing_of_others(browser, built):
    for path in (built[1], built[1].parent / "notebooks" / "05_main_results.html"):
        requested, said = opened(browser, path)
        assert {url.split(":")[0] for url in requested if not url.startswith("chrome")} <= {"file", "data"}
        assert [url for url in requested if url.startswith("file")] == [path.as_uri()]
        assert browser.execute_script("return window.pwned") is None
        if path == built[1]:
            assert said == [] and SCRIPT in at(browser, "#table-05_main_results_names").text


def test_a_click_or_a_key_explains_the_pixel(browser, built):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    opened(browser, built[1])
    stage = at(browser, STAGE)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    box = stage.rect
    for row, column in np.ndindex(4, 7):
        across, down = (column + 0.5) * box["width"] / 7 - box["width"] / 2, (row + 0.5) * box["height"] / 4 - box["height"] / 2
        ActionChains(browser).move_to_element_with_offset(stage, round(across), round(down)).click().perform()
        check_told(browser, row, column)
    for keys, (row, column) in ((Keys.PAGE_UP + Keys.HOME, (0, 0)), (Keys.ARROW_DOWN * 2 + Keys.ARROW_RIGHT, (2, 1)),
                                (Keys.END, (2, 6)), (Keys.ARROW_RIGHT, (2, 6)), (Keys.SHIFT + Keys.ARROW_DOWN, (3, 6)),
                                (Keys.ARROW_UP, (2, 6)), (Keys.ARROW_LEFT, (2, 5)), (Keys.PAGE_DOWN, (3, 5))):
        stage.send_keys(keys)
        check_told(browser, row, column)
    assert browser.execute_script("return window.pwned") is None


def test_images_are_chosen_labels_hidden_and_dropped_classes_listed(browser, built):
    opened(browser, built[1])
    rows = [row.get_attribute("textContent") for row in browser.find_elements("css selector", ".two tbody tr")]
    assert len(rows) == 3 and "dropped" in rows[2] and NAMES[1] in rows[2]
    browser.execute_script("const b = document.querySelectorAll('.choose button'); b[1].click(); b[0].click();")
    time.sleep(0.5)  # of images chosen in haste the last is shown
    assert at(browser, STAGE).get_attribute("aria-label").startswith(f"one {SCRIPT}:")
    browser.find_elements("css selector", ".choose button")[1].click()
    assert wait(browser, lambda b: at(b, STAGE).get_attribute("aria-label").startswith("two:"))
    assert at(browser, ".painted").is_displayed()
    at(browser, ".two input").click()
    assert not at(browser, ".painted").is_displayed()


def test_broken_panel_data_are_a_sentence(browser, built, tmp_path):
    folder = tmp_path / "mini"
    data = json.loads((built[0] / "explain" / "06_explainability_panel.json").read_text(encoding="utf-8"))
    data["images"][0]["winner"] = "AAAA"
    write_panel(folder / "explain" / "06_panel.json", data)
    browser.get(build_report(folder, load_profile("mini"), tmp_path).as_uri())
    assert wait(browser, lambda b: b.find_elements("css selector", ".panel .problem"))
    assert "cannot be read" in at(browser, ".panel").text
