"""The report page: every number beside its source, user text that stays text, nothing from the network; and in a browser, as a reader
meets it."""

import base64
import csv
import html
import importlib
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from test_explain import rows as hand_made_prototypes

from ovdiff_lib.categories import Category, Vocabulary
from ovdiff_lib.cli import main as cli
from ovdiff_lib.cli.notebooks import run_report
from ovdiff_lib.errors import InputError
from ovdiff_lib.overlay import colours_of
from ovdiff_lib.profiles.reading import load_profile
from ovdiff_lib.segmentation import Segmentation, explain
from ovdiff_lib.types import PrototypeBank, SupportSet
from ovdiff_lib.workbench import reproduce as runner
from ovdiff_lib.workbench.figures import base as figures
from ovdiff_lib.workbench.page.collect import collect, command, git_commit, hidden, settings, versions
from ovdiff_lib.workbench.page.notebook_html import formula, notebook_body
from ovdiff_lib.workbench.page.page import STAMP, build_report, duration, number, plain
from ovdiff_lib.workbench.page.panel import panel_data, write_panel
from ovdiff_lib.workbench.tables import claims
from ovdiff_lib.workbench.tables.paper import PaperCell, paper_cell
from ovdiff_lib.workbench.tables.tables import Cell, write_table

SCRIPT, QUOTED, ARABIC, EMOJI = "<script>window.pwned = 1</script>", "a \"b\" & 'c'", "كلب صغير", "🛋 \u202esofa"
NAMES = (SCRIPT, QUOTED, f"{ARABIC} {EMOJI}")
REMOTE = "https://example.org/tracker.png"
VOC, CONTEXT = "mini-voc (VOC)", "mini-context (Context)"


def segmentation() -> Segmentation:
    """6 x 9 pixels decided by prototypes made by hand: background and two of three classes; the second was dropped by the filter."""
    rng = np.random.default_rng(5)
    vocabulary = Vocabulary(tuple(Category(name) for name in NAMES))
    bank = PrototypeBank(vocabulary, {"sd": (hand_made_prototypes(),) * 3}).restrict([0, 2])
    scores = np.full((4, 6, 9), -np.inf, np.float32)
    scores[[0, 1, 3]] = rng.random((3, 6, 9), np.float32)
    labels = scores.argmax(0).astype(np.int32)
    winner = np.where(labels == 0, rng.integers(0, 10, labels.shape), rng.integers(0, 5, labels.shape)).astype(np.int32)
    image = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Segmentation(image, labels, scores[[0, 1, 3]], winner, vocabulary, (0, 2), np.array([0.6, 0.05, 0.35], np.float32), bank)


def supports() -> list[SupportSet]:
    rng = np.random.default_rng(1)
    return [SupportSet(Category(name), rng.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8), np.zeros((2, 2, 3), np.float32), np.arange(2))
            for name in NAMES]


def notebook(stem: str, outputs=(), tags: str = "parameters") -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python", "version": "3.11.9"}})
    made.cells = [nbformat.v4.new_markdown_cell(f"# All about {stem}\n\nWith $N$ images and $\\frac{{a}}{{b}}$, see [a page](https://example.org)."),
                  nbformat.v4.new_code_cell("profile = 'mini'  # which\nseed = 3  # random numbers", metadata={"tags": [tags]}),
                  nbformat.v4.new_code_cell("import math\nprint(1)", execution_count=2, outputs=list(outputs))]
    return made


def display(**data):
    return nbformat.v4.new_output("display_data", data={name.replace("_", "/"): value for name, value in data.items()})


def png(width=30, height=20) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path) -> Path:
    """An outputs folder as a run leaves it, and the stripped notebooks beside it; returns the latter's folder."""
    profile = load_profile("mini")
    cells = [Cell.of("OVDiff", VOC, [50.0, 52.0, 51.0], paper_cell("1", "OVDiff", "VOC")),
             Cell.of("OVDiff", CONTEXT, [30.0, 30.5, 31.0], paper_cell("1", "OVDiff", "Context")),
             Cell.of("MaskCLIP", VOC, [10.0, 11.0, 12.0], paper_cell("1", "MaskCLIP", "VOC")),
             Cell.of("MaskCLIP", CONTEXT, [28.0, 28.0, 28.0], paper_cell("1", "MaskCLIP", "Context")),
             Cell.of("CLIP-DIY", VOC, [20.0, 19.0, 21.0], paper_cell("1", "CLIP-DIY", "VOC")),
             Cell.of("CLIP-DIY", CONTEXT, [8.0, 9.0, 7.0], PaperCell.own("1", "CLIP-DIY", "Context")),
             Cell("TCL", VOC, paper=paper_cell("1", "TCL", "VOC"), source="published"),
             Cell("CLIPpy", CONTEXT, paper=paper_cell("1", "CLIPpy", "Context"), source="published"),
             Cell("a mix", VOC, 7.0, n=2, source="predictions"),
             Cell("a mix", CONTEXT, paper=paper_cell("1", "TCL", "Context"), source="published")]
    write_table(folder / "tables" / "05_main_results.csv", "05_main_results", cells, profile, "mIoU on two data sets.", title="Table 1",
                details={"images": 211, "seeds": [0, 1, 2]})
    hostile = [Cell(name, column, float(i)) for i, name in enumerate(NAMES) for column in (SCRIPT, "images")]
    write_table(folder / "tables" / "05_main_results_names.csv", "05_main_results_names", hostile, profile, f"Caption {SCRIPT}.",
                {"images": 0}, title=SCRIPT, details={SCRIPT: SCRIPT, "volatile": ["images"]})
    claims.write_claims(folder)
    sketch = figures.image_grid([[np.zeros((20, 30, 3), np.uint8)] * 5], ["row"], list("abcde"))
    figures.save_figure(sketch, folder / "figures" / "05_main_results_grid.png", f"Five pictures of {SCRIPT} and {EMOJI}.")
    write_panel(folder / "explain" / "06_explainability_panel.json",
                panel_data({f"one {SCRIPT}": segmentation(), "two": segmentation()}, supports(), profile.filters, caption=f"On {SCRIPT}."))
    bar = [f"mini-voc:  {40 * i}%|{'#' * i}     | {i}/5 [00:0{i}<00:03,  1.2s/image]" for i in range(3)]
    outputs = [nbformat.v4.new_output("stream", name="stderr", text=f"first draft\rfinal text\n{bar[0]}\r{bar[1]}"),
               nbformat.v4.new_output("stream", name="stderr", text=f"\r{bar[2]}\n3it [00:02,  1.25it/s]\na warning at 40% [of 5]\n"),
               nbformat.v4.new_output("stream", name="stdout", text=f"in {folder.resolve()}/tables {SCRIPT}\n"),
               display(text_markdown=f"| class |\n|---|\n| {SCRIPT} |\n| <img src='{REMOTE}'> |", text_plain="text"),
               display(text_html=f"<b>bold</b><script>window.pwned = 2</script><img src='{REMOTE}' onerror='window.pwned = 3'>"),
               display(application_javascript="window.pwned = 4", text_plain="plain"),
               display(image_png=base64.b64encode(png()).decode())]
    nbformat.write(notebook("main results", outputs), folder / "05_main_results.ipynb")
    given = {"profile": "mini", "overrides": {"support.size": 8}, "output": str(folder.resolve()), "images": 6}
    stamp = {"source": "s", "package": "abcdef0123456789", "parameters": json.dumps(given), "outputs": {}, "seconds": 192.4,
             "finished": "2025-01-02 03:04:05"}
    (folder / "05_main_results.stamp.json").write_text(json.dumps(stamp))
    error = nbformat.v4.new_output("error", ename="ValueError", evalue=f"no {SCRIPT} in {folder.resolve()}\nmore", traceback=[])
    nbformat.write(notebook("explanations", [error]), folder / "06_explainability.failed.ipynb")
    sources = folder.parent.parent / "notebooks"
    sources.mkdir(exist_ok=True)
    for stem in ("05_main_results", "06_explainability", "07_in_the_wild"):
        nbformat.write(notebook(stem), sources / f"{stem}.ipynb")
    return sources


class Page(HTMLParser):
    """Elements, the text of sections, and the rows of tables, each with the class of its body."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements, self.open, self.text, self.tables = [], [], {}, {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def section(self) -> str:
        return next((a["id"] for tag, a in reversed(self.open) if tag in ("section", "figure") and "id" in a), "")

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "tr":
            body = next((a.get("class", "") or tag for tag, a in reversed(self.open) if tag in ("thead", "tbody")), "")
            self.tables.setdefault(self.section(), []).append((body, []))
        if tag in ("td", "th") and self.section() in self.tables:
            self.tables[self.section()][-1][1].append("")
        if tag not in self.VOID:
            self.open.append((tag, attributes))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()
        if tag in ("dt", "dd", "td", "th", "li"):
            for _, attributes in self.open:
                if "id" in attributes:
                    self.text[attributes["id"]] = self.text.get(attributes["id"], "") + " "

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "script" in tags or "style" in tags:
            return
        for _, attributes in self.open:
            if "id" in attributes:
                self.text[attributes["id"]] = self.text.get(attributes["id"], "") + data
        if {"td", "th"} & set(tags):
            rows = self.tables[self.section()]
            rows[-1][1][-1] += data

    def row(self, section, name, body=None):
        """The cells of a row by its first, blanks made one."""
        for kind, cells in self.tables[section]:
            cells = [" ".join(c.split()) for c in cells]
            if cells[0] == name and body in (None, kind):
                return cells[1:]
        raise AssertionError(f"no row {name!r}")

    def addresses(self):
        """Everything that a browser would load, and the targets of links."""
        for tag, attributes in self.elements:
            for name in ("src", "href", "srcset", "poster", "data", "action"):
                if name in attributes:
                    yield tag, attributes[name]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(outputs folder, path of the page, the page)."""
    folder = tmp_path_factory.mktemp("project") / "outputs" / "mini"
    sources = fill(folder)
    path = build_report(folder, load_profile("mini"), sources)
    return folder, path, Page(path)


# ---- numbers

def test_the_page_lies_in_the_outputs_folder(built):
    folder, path, _ = built
    assert path == folder / "report" / "index.html" and [p.name for p in path.parent.iterdir() if p.suffix == ".part"] == []


def test_measured_numbers_stand_beside_the_papers_and_their_difference(built):
    page = built[2]
    assert page.row("table-05_main_results", "OVDiff") == ["51.0 ± 1.0 (n = 3)", "66.3 ± 0.2", "−15.3",
                                                           "30.5 ± 0.5 (n = 3)", "29.7 ± 0.3", "+0.8"]
    assert page.row("table-05_main_results", "CLIP-DIY") == ["20.0 ± 1.0 (n = 3)", "59.9", "−39.9", "8.0 ± 1.0 (n = 3)", "", ""]
    assert page.row("table-05_main_results", "a mix") == ["7.0 (n = 2) predictions", "", "", "not measured", "24.3", ""]
    names = page.row("table-05_main_results_names", QUOTED)
    assert names == ["1.0", "1"]  # no column for a paper that has no such table; digits as the notebook asked
    text = page.text["table-05_main_results"]
    assert "mIoU on two data sets." in text and "Table 1" in text and "Mean ± sample standard deviation" in text
    assert "n = 1: one run a number" in page.text["table-05_main_results_names"]


def test_published_rows_are_apart_and_hold_nothing_measured(built):
    rows = built[2].tables["table-05_main_results"]
    published = [[" ".join(c.split()) for c in cells] for body, cells in rows if body == "published"]
    assert published[0][0].startswith("published") and "nothing in these rows was measured here" in published[0][0]
    assert published[1:] == [["TCL", "", "51.2", "", "", "", ""], ["CLIPpy", "", "", "", "", "not reported", ""]]
    assert {cells[0] for body, cells in rows if body == "tbody"} == {"OVDiff", "MaskCLIP", "CLIP-DIY", "a mix"}


def test_every_comparison_with_the_paper_is_stamped(built):
    page = built[2]
    stamp = f"mini: {STAMP}"
    assert stamp in page.text["table-05_main_results"] and stamp in page.text["claims"] and stamp in page.text["overview"]
    assert stamp not in page.text["table-05_main_results_names"]  # nothing of the paper stands there


def test_a_profile_with_the_papers_models_has_no_stamp(built, tmp_path):
    folder, _, _ = built
    shutil.copytree(folder, tmp_path / "paper")
    page = Page(build_report(tmp_path / "paper", load_profile("paper"), None))
    assert STAMP not in page.source and "66.3" in page.text["table-05_main_results"]


def test_the_overview_compares_with_the_best_measured_rival(built):
    page = built[2]
    assert f"{VOC}: OVDiff 51.0, the best measured rival (CLIP-DIY) 20.0." in page.text["overview"]
    assert f"{CONTEXT}: OVDiff 30.5, the best measured rival (MaskCLIP) 28.0." in page.text["overview"]
    assert "TCL" not in page.text["overview"]
    assert page.row("overview", "OVDiff") == ["51.0 ± 1.0 paper 66.3 ± 0.2", "30.5 ± 0.5 paper 29.7 ± 0.3"]
    assert page.row("overview", "CLIP-DIY") == ["20.0 ± 1.0 paper 59.9", "8.0 ± 1.0"]


def test_claims_are_counted_and_listed(built):
    folder, _, page = built
    judged = claims.judge(folder)
    counts = claims.counts(judged)
    assert counts["holds"] > 0 and counts["not measured"] > 0
    assert f"{counts['holds']} of the paper’s {len(judged)} claims hold here" in page.text["overview"]
    for verdict, count in counts.items():
        assert f"{count} {verdict}" in " ".join(page.text["overview"].split())
    rows = [cells for body, cells in page.tables["claims"] if body == "tbody"]
    assert len(rows) == len(judged)
    for cells, claim in zip(rows, judged, strict=True):
        assert cells[0] == str(claim.id) and claim.claim in cells[1] and claim.source in cells[1] and cells[2] == claim.verdict
        assert cells[3] == claim.paper_values and cells[4] == (claim.measured or "–") and claim.note in cells[5] and claim.how in cells[5]


def test_figures_are_whole_and_have_their_captions(built):
    folder, _, page = built
    assert f"Five pictures of {SCRIPT} and {EMOJI}." in page.text["figure-05_main_results_grid"]
    images = [a for tag, a in page.elements if tag == "img"]
    assert len(images) == 1
    kind, _, body = images[0]["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(body) == (folder / "figures" / "05_main_results_grid.png").read_bytes()


def test_tables_can_be_taken_away_as_csv(built):
    folder, _, page = built
    offered = {a["download"]: a["href"] for tag, a in page.elements if tag == "a" and "download" in a}
    assert set(offered) == {"05_main_results.csv", "05_main_results_names.csv"}
    for name, address in offered.items():
        data = base64.b64decode(address.removeprefix("data:text/csv;base64,"))
        assert data == (folder / "tables" / name).read_bytes() and list(csv.DictReader(io.StringIO(data.decode())))


# ---- where they come from

def test_the_command_settings_seeds_and_time_behind_each_table_and_figure(built):
    page = built[2]
    digest = load_profile("mini").digest()
    for section in ("table-05_main_results", "figure-05_main_results_grid"):
        text = " ".join(page.text[section].split())
        assert "ovdiff run notebooks/05_main_results.ipynb --profile mini --set support.size=8 -p images=6" in text
        assert "3 min 12 s" in text and "2025-01-02 03:04:05" in text
    assert digest in page.text["table-05_main_results"] and "0, 1, 2" in page.text["table-05_main_results"]
    assert "images vary from run to run" in page.text["table-05_main_results_names"].replace(": these", "")


def test_versions_settings_and_commit(built):
    page = built[2]
    text = " ".join(page.text["provenance"].split())
    for module in ("torch", "diffusers", "transformers"):
        assert f"{module} {importlib.import_module(module).__version__.split('+')[0]}" in text
    assert "ovdiff_lib 0" in text and "python 3" in text and "settings hash " + load_profile("mini").digest() in text
    assert "overrides none for the profile as a whole" in text and "seeds 0, 1, 2, 3" in text  # three of the tables, one of the notebook
    assert "abcdef012345, the same for all" in text and "wall time of all notebooks 3 min 12 s (1 notebook)" in text
    assert page.row("provenance", "support.size") == [str(load_profile("mini").support.size)] and "python of the notebooks 3.11.9" in text
    assert set(versions()) >= {"python", "ovdiff_lib", "torch", "diffusers", "transformers"}


def test_overrides_of_the_whole_profile_are_named(built):
    folder = built[0]
    profile, size = load_profile("mini", {"support.size": 5, "matching.windows": [64]}), load_profile("mini").support.size
    changed = {name: (value, shipped) for name, value, shipped in settings(profile) if value != shipped}
    assert changed == {"support.size": (5, size), "matching.windows": ([64], [64, 48])}
    other = folder.parent / "other"
    shutil.copytree(folder / "tables", other / "tables")
    text = " ".join(Page(build_report(other, profile, None)).text["provenance"].split())
    assert f"support.size = 5 (shipped: {size})" in text and "matching.windows = 64 (shipped: 64, 48)" in text and profile.digest() in text


def test_the_command_shown_runs_the_notebook_as_it_ran(tmp_path, monkeypatch):
    """What the command line makes of the printed command are the parameters that were recorded."""
    ran = []
    monkeypatch.setattr(runner, "run_notebook", lambda notebook, output, parameters, **_: ran.append((notebook, output, parameters)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "05_main_results.ipynb").touch()
    given = {"profile": "mini", "overrides": {"support.size": 8, "matching.windows": [64, 48], "support.prompt": "a 'b' {name}"},
             "output": str(tmp_path / "outputs" / "mini"), "images": 6, "classes": ["dog", QUOTED], "word": "x y", "none": None}
    for parent, extra in ((tmp_path / "outputs", []), (tmp_path / "a b", ["--out", "a b"])):
        folder = parent / "mini"
        folder.mkdir(parents=True)
        stamp = {"parameters": json.dumps(given | {"output": str(folder)})}
        (folder / "05_main_results.stamp.json").write_text(json.dumps(stamp))
        words = shlex.split(command(collect(folder).runs[0], folder))
        assert words[:2] == ["ovdiff", "run"] and ("--out" in words) == bool(extra) and words[len(words) - len(extra):] == extra
        assert cli.main(words[1:]) == 0
        assert ran.pop() == (Path("notebooks/05_main_results.ipynb"), folder / "05_main_results.ipynb", given | {"output": str(folder)})


def test_the_commit_is_that_of_the_package(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    assert git_commit(package) == ""  # no checkout
    (package / "__init__.py").write_text("")
    git("init")
    assert git_commit(package) == ""  # nothing committed
    git("commit", "--allow-empty", "-m", "another project")
    assert git_commit(package) == ""  # a package that git does not know: someone else's checkout
    git("add", "package")
    git("commit", "-m", "ours")
    clean = git_commit(package)
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (package / "__init__.py").write_text("1")
    assert git_commit(package) == f"{clean} with uncommitted changes"


# ---- what is missing

def test_what_failed_or_has_not_run_is_a_sentence(built):
    page = built[2]
    assert f"The last run of 06_explainability failed: ValueError: no {SCRIPT} in ../outputs/mini" in page.text["missing"]
    assert "The notebook 07_in_the_wild has not been run in this folder." in page.text["run-07_in_the_wild"]
    assert "05_main_results" not in page.text["missing"] and "All about main results" in page.text["run-05_main_results"]


def test_tables_without_their_notebook_are_still_shown(built, tmp_path):
    folder = built[0]
    for name in ("tables", "figures"):
        shutil.copytree(folder / name, tmp_path / "outputs" / "mini" / name)
    page = Page(build_report(tmp_path / "outputs" / "mini", load_profile("mini"), folder.parent.parent / "notebooks"))
    assert "come from an earlier run" in page.text["run-05_main_results"] and "51.0" in page.text["table-05_main_results"]
    without = Page(build_report(tmp_path / "outputs" / "mini", load_profile("mini"), None))
    assert "Other tables and figures" in without.text["run-others"] and "51.0" in without.text["table-05_main_results"]
    assert "has not run in this folder" in without.text["explain"]


def test_an_empty_folder_gives_a_page_and_none_an_error(tmp_path):
    (tmp_path / "mini").mkdir()
    page = Page(build_report(tmp_path / "mini", load_profile("mini"), None))
    assert "has not been measured in this folder" in page.text["overview"] and "0 of the paper’s" in page.text["overview"]
    with pytest.raises(InputError, match="does not exist; run the notebooks first"):
        build_report(tmp_path / "none", load_profile("mini"))


def test_broken_pieces_are_named_and_the_rest_is_shown(built, tmp_path):
    folder = tmp_path / "mini"
    shutil.copytree(built[0], folder)
    (folder / "tables" / "05_main_results_names.csv").write_text("torn,")
    (folder / "tables" / "05_main_results_more.csv").write_bytes((folder / "tables" / "05_main_results.csv").read_bytes())
    (folder / "tables" / "05_main_results_more.json").write_text("{")
    (folder / "figures" / "05_main_results_torn.png").write_bytes(b"no picture")
    (folder / "explain" / "06_torn.json").write_text("{")
    (folder / "05_main_results.stamp.json").write_text('{"parameters": ')
    (folder / "05_main_results.ipynb").write_text('{"cells": 3}')
    (folder / "08_cost.ipynb").write_text(json.dumps({"cells": [{"cell_type": "nonsense"}], "metadata": {}}))
    (folder / "09_swap_in.failed.ipynb").write_text("{")
    page = Page(build_report(folder, load_profile("mini"), None))
    missing = page.text["missing"]
    for words in ("05_main_results_names.csv is not a table", "05_main_results_more.json cannot be read as JSON",
                  "figure 05_main_results_torn.png cannot be read", "06_torn.json is no explain panel",
                  "05_main_results.ipynb cannot be read as a notebook", "executed notebook 08_cost.ipynb cannot be shown",
                  "The last run of 09_swap_in did not finish", "claims could not be judged"):
        assert words in missing, words
    assert str(folder) not in page.source
    assert "51.0" in page.text["table-05_main_results"] and "Five pictures" in page.text["figure-05_main_results_grid"]


def test_pages_of_notebooks_that_are_gone_go(built, tmp_path):
    folder = tmp_path / "mini"
    shutil.copytree(built[0], folder)
    (folder / "report" / "notebooks" / "04_old.html").write_text("old")
    (folder / "05_main_results.ipynb").unlink()
    page = Page(build_report(folder, load_profile("mini"), None))
    assert list((folder / "report" / "notebooks").iterdir()) == [] and 'href="notebooks/' not in page.source


# ---- one page, no network, text that stays text

def test_nothing_is_loaded_from_anywhere(built):
    folder, path, _ = built
    for file in (path, *path.parent.glob("notebooks/*.html")):
        for tag, address in Page(file).addresses():
            if tag == "a":  # links are followed by the reader, not by the browser
                assert not address.startswith(("javascript:", "file:", "/")), address
            else:
                assert address.startswith("data:"), address
        text = file.read_text(encoding="utf-8")
        assert "@import" not in text and "url(" not in text
        assert "default-src 'none'" in text and "img-src data:;" in text
        assert str(folder.resolve()) not in text and str(Path.home()) + "/" not in text


def test_the_script_is_the_one_the_policy_allows(built):
    import hashlib

    source = built[2].source
    allowed = re.search(r"script-src '(sha256-[^']+)'", source)[1]
    scripts = re.findall(r"<script>(.*?)</script>", source, re.S)
    assert len(scripts) == 1
    assert allowed == "sha256-" + base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()


def test_text_from_data_is_escaped(built):
    _, _, page = built
    assert [a for tag, a in page.elements if tag == "script"] == [{"type": "application/json", "id": "panel-0"}, {}]
    assert "<script>window" not in page.source
    assert html.escape(QUOTED, quote=False) in page.source.replace("&#34;", '"').replace("&#39;", "'") and ARABIC in page.source
    embedded = re.search(r'<script type="application/json" id="panel-0">(.*?)</script>', page.source, re.S)[1]
    assert "<" not in embedded
    assert json.loads(embedded)["images"][0]["classes"][1:] == list(NAMES)
    assert page.row("table-05_main_results_names", SCRIPT) == ["0.0", "0"]


def test_contents_and_links_lead_somewhere(built):
    _, path, page = built
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    inner = [address[1:] for tag, address in page.addresses() if tag == "a" and address.startswith("#")]
    assert set(inner) <= set(ids) and {"overview", "claims", "explain", "provenance", "run-05_main_results",
                                       "table-05_main_results"} <= set(inner)
    outer = [address for tag, address in page.addresses() if tag == "a" and not address.startswith(("#", "data:"))]
    assert outer == ["notebooks/05_main_results.html"] and (path.parent / outer[0]).exists()


def test_structure_for_screen_readers(built):
    page = built[2]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    for tag, attributes in page.elements:
        if tag == "img":
            assert attributes["alt"] and attributes["width"] and attributes["height"]
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["role"] == "region" and {"aria-label", "aria-labelledby"} & set(attributes)
        if tag == "th" and attributes.get("role") != "columnheader":
            assert "scope" in attributes


# ---- executed notebooks

def test_a_notebook_page_shows_its_cells_and_runs_nothing(built):
    page = (built[1].parent / "notebooks" / "05_main_results.html").read_text(encoding="utf-8")
    assert "All about main results" in page and 'aria-label="N"' in page and "<svg" in page
    assert "final text\na warning at 40% [of 5]" in page and "first draft" not in page  # as a terminal ends, but for the progress bars
    assert "mini-voc:" not in page and "it/s" not in page
    assert "in ../outputs/mini/tables &lt;script&gt;" in page
    assert "<td>&lt;script&gt;window.pwned = 1&lt;/script&gt;</td>" in page  # raw HTML in Markdown stays text
    assert "window.pwned = 4" not in page and "<b>bold</b>" in page
    assert 'alt="Figure of the section “All about main results”."' in page
    assert "script-src" not in page and "default-src 'none'" in page
    assert 'href="../index.html"' in page and "mathjax" not in page.lower() and "cdnjs" not in page


def test_formulas_are_drawn_inside_their_box_and_others_stay_tex():
    for tex in ("K", r"\frac{1}{|S|}\sum_{s \in S} \cos(f, P_s)", r"\lVert x\rVert", r"\mathcal P_c^{\mathrm{fg}}", r"\sqrt d",
                r"\hat y = \text{a b}"):
        drawn = formula(tex)
        left, top, width, height = map(float, re.search(r'viewBox="([^"]+)"', drawn)[1].split())
        numbers = np.array([list(map(float, pair)) for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", re.search(r' d="([^"]+)"', drawn)[1])])
        assert numbers[:, 0].min() >= left - 1 and numbers[:, 0].max() <= left + width + 1
        assert numbers[:, 1].min() >= top - 1 and numbers[:, 1].max() <= top + height + 1
        assert np.ptp(numbers[:, 0]) > 0.3 * width and np.ptp(numbers[:, 1]) > 0.3 * height  # it fills what it takes
        assert f'aria-label="{html.escape(tex)}"' in drawn
    assert formula(r"\begin{cases} a < b \end{cases}") == r'<code class="tex">\begin{cases} a &lt; b \end{cases}</code>'
    assert formula("K").count("<path") == 1 and formula("a") != formula("b")


def test_what_is_no_notebook_is_one_sentence(tmp_path):
    path = tmp_path / "05_x.ipynb"
    for text in ("", "{", "[]", '{"cells": [{"cell_type": "nonsense"}]}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"05_x.ipynb cannot be shown .*; run it again"):
            notebook_body(path)


def test_folders_of_this_machine_are_taken_out(tmp_path):
    folder = tmp_path / "outputs" / "mini"
    folder.mkdir(parents=True)
    package = Path(importlib.import_module("numpy").__file__).parent
    text = f'{folder}/tables and {folder}2 and {package}/a.py and {Path.home()}/b "{folder}"'
    assert hidden(text, folder).split() == ["../outputs/mini/tables", "and", f"{folder}2".replace(str(Path.home()) + "/", "~/"), "and",
                                            "site-packages/numpy/a.py", "and", "~/b", '"../outputs/mini"']


# ---- small parts

@pytest.mark.parametrize(("seconds", "text"), [(None, "unknown"), (0.25, "0.25 s"), (48, "48 s"), (59.6, "59.6 s"), (60, "1 min 0 s"),
                                               (192.4, "3 min 12 s"), (3599.7, "1 h 0 min"), (7500, "2 h 5 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers_and_values_as_text():
    assert [number(-1.25, 1), number(3, 2, True), number(None, 1)] == ["−1.2", "+3.00", ""]
    assert [plain(v) for v in (True, None, [1, 2.5, "a"], [], {"a": [1]}, "b")] == ["yes", "none", "1, 2.5, a", "none", '{"a": [1]}', "b"]


def test_the_command_line_writes_the_page(built, tmp_path, capsys):
    import argparse

    shutil.copytree(built[0] / "tables", tmp_path / "mini" / "tables")
    run_report(argparse.Namespace(profile="mini", set=["support.size=4"], out=tmp_path, notebooks=tmp_path / "none"))
    assert str(tmp_path / "mini" / "report" / "index.html") in capsys.readouterr().out
    assert "support.size = 4" in " ".join(Page(tmp_path / "mini" / "report" / "index.html").text["provenance"].split())


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


def opened(browser, path, width=1280, height=900):
    """Load a page at a size; returns what was requested and what the console said."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for log in ("performance", "browser"):
        browser.get_log(log)
    browser.get(path.as_uri())
    if "index" in path.name:
        wait(browser, lambda b: b.find_elements("css selector", ".panel[data-ready=true]"))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return requested, [entry["message"] for entry in browser.get_log("browser")]


def told(browser):
    return {part: at(browser, f".answer {part}").text for part in ("h4", ".prototype", ".second")}


def check_told(browser, row, column):
    """What the panel shows of a pixel of its first image against explain()."""
    result = segmentation()
    why = explain(result, result.bank, row, column)
    shown = told(browser)
    assert shown["h4"] == f"{why.class_name} at row {row}, column {column}"
    assert f"{why.kind} prototype" in shown[".prototype"] and f"(number {why.index}, features of sd)" in shown[".prototype"]
    assert ("background" in shown[".prototype"]) == (why.region == "background") and why.category in shown[".prototype"]
    assert shown[".second"].startswith(f"Runner-up: {why.runner_up}, ")
    assert float(re.search(r"([\d.]+) behind", shown[".second"])[1]) == pytest.approx(why.margin, abs=0.004)
    regions = browser.find_elements("css selector", ".regions svg")
    assert [r.get_attribute("aria-label") for r in regions] == [
        f"Support image {n}, {mask.sum()} of 6 features highlighted" for n, mask in zip(why.images, why.masks, strict=True)]
    for region, mask in zip(regions, why.masks, strict=True):
        pale = region.find_elements("css selector", "path")[0].get_attribute("d")
        assert {(int(y), int(x)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", pale)} == set(zip(*np.nonzero(~mask), strict=True))
    said = at(browser, "[role=status]").get_attribute("textContent")
    assert why.class_name in said and why.runner_up in said and why.category in said


def click(browser, row, column):
    from selenium.webdriver import ActionChains

    canvas = at(browser, "canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    box = canvas.rect
    across, down = (column + 0.5) * box["width"] / 9 - box["width"] / 2, (row + 0.5) * box["height"] / 6 - box["height"] / 2
    ActionChains(browser).move_to_element_with_offset(canvas, round(across), round(down)).click().perform()


def test_the_page_opens_from_disk_alone(browser, built):
    requested, said = opened(browser, built[1])
    assert said == [] and built[1].as_uri() in requested
    assert {url.split(":")[0] for url in requested if not url.startswith("chrome")} <= {"file", "data"}
    assert [url for url in requested if url.startswith("file")] == [built[1].as_uri()]
    assert browser.execute_script("return window.pwned") is None
    assert SCRIPT in at(browser, "#table-05_main_results_names").text


def test_a_click_explains_the_pixel(browser, built):
    opened(browser, built[1])
    labels = segmentation().labels
    pixels = [tuple(map(int, np.argwhere(labels == label)[k])) for label in np.unique(labels) for k in (0, -1)]
    for row, column in pixels:
        click(browser, row, column)
        check_told(browser, row, column)
    assert browser.execute_script("return window.pwned") is None


def test_the_panel_lists_the_classes_the_filter_dropped(browser, built):
    opened(browser, built[1])
    assert at(browser, ".answer details summary").text == "Queried classes: 2 kept, 1 dropped by the category filter"
    rows = [r.text for r in browser.find_elements("css selector", ".queried tbody tr")]
    assert rows == [f"{NAMES[0]} 0.6000 kept", f"{NAMES[2]} 0.3500 kept", f"{NAMES[1]} 0.0500 dropped: below 1/C"]


def test_the_panel_works_without_a_mouse(browser, built):
    from selenium.webdriver.common.keys import Keys

    opened(browser, built[1])
    canvas = at(browser, "canvas")
    browser.execute_script("arguments[0].focus()", canvas)
    for keys, (row, column) in ((Keys.PAGE_UP + Keys.HOME, (0, 0)), (Keys.ARROW_DOWN * 2 + Keys.ARROW_RIGHT, (2, 1)),
                                (Keys.END, (2, 8)), (Keys.ARROW_RIGHT, (2, 8)), (Keys.SHIFT + Keys.ARROW_DOWN, (5, 8)),
                                (Keys.ARROW_UP, (4, 8)), (Keys.ARROW_LEFT, (4, 7))):
        canvas.send_keys(keys)
        check_told(browser, row, column)
    for name, value in (("row", 1), ("column", 3)):
        field = at(browser, f"input[name={name}]")
        field.clear()
        field.send_keys(str(value) + Keys.ENTER)
    check_told(browser, 1, 3)
    # Every control is reached by the tabulator, and the focus is seen.
    browser.execute_script("document.querySelector('.panel button').focus()")
    reached = []
    for _ in range(12):
        reached.append(browser.execute_script("const e = document.activeElement; return e.tagName + (e.type ? ':' + e.type : '')"))
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert {"BUTTON:button", "CANVAS", "INPUT:radio", "INPUT:number"} <= set(reached)


def test_images_and_views_can_be_chosen(browser, built):
    opened(browser, built[1])

    def colours():
        return browser.execute_script(
            "const c = document.querySelector('canvas'), s = c.width / 9, d = c.getContext('2d');"
            "const at = (row, column) => [...d.getImageData((column + .25) * s, (row + .25) * s, 1, 1).data].slice(0, 3);"
            "return [...Array(54).keys()].map(i => at(Math.floor(i / 9), i % 9))")

    at(browser, "input[value=labels]").click()
    result = segmentation()
    palette = {label: colours_of(result.class_names)[label].tolist() for label in np.unique(result.labels)}
    assert colours() == [palette[label] for label in result.labels.ravel()]
    at(browser, "input[value=image]").click()
    assert colours() != [palette[label] for label in result.labels.ravel()]
    buttons = browser.find_elements("css selector", ".choose button")
    assert [b.get_attribute("aria-pressed") for b in buttons] == ["true", "false"] and buttons[0].text == f"one {SCRIPT}"
    buttons[1].click()
    wait(browser, lambda b: [b.get_attribute("aria-pressed") for b in buttons] == ["false", "true"])
    assert at(browser, "canvas").get_attribute("aria-label").startswith("two:")


def test_of_images_chosen_in_haste_the_last_is_shown(browser, built):
    opened(browser, built[1])
    browser.execute_script("""
        const buttons = document.querySelectorAll(".choose button");
        buttons[1].click(); buttons[0].click();      // the first is read already, the second is not
        window.settled = new Promise((done) => setTimeout(done, 500)).then(() => { window.settled = true; });""")
    wait(browser, lambda b: b.execute_script("return window.settled === true"))
    assert [b.get_attribute("aria-pressed") for b in browser.find_elements("css selector", ".choose button")] == ["true", "false"]
    assert at(browser, "canvas").get_attribute("aria-label").startswith(f"one {SCRIPT}:")


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_pages_fit_their_screen(browser, built, width):
    for path in (built[1], built[1].parent / "notebooks" / "05_main_results.html"):
        opened(browser, path, width, 740)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    opened(browser, built[1], width, 740)
    assert browser.execute_script("return document.getElementById('contents').open") == (width >= 1024)
    box = at(browser, "#table-05_main_results .scroll")
    wider = browser.execute_script("const b = arguments[0]; b.scrollLeft = 1e4; return b.scrollLeft > 0", box)
    assert wider or width > 360
    if width == 360:
        click(browser, 2, 4)
        check_told(browser, 2, 4)


def test_a_notebook_page_loads_nothing_and_runs_nothing(browser, built):
    path = built[1].parent / "notebooks" / "05_main_results.html"
    requested, said = opened(browser, path)
    assert {url.split(":")[0] for url in requested if not url.startswith("chrome")} <= {"file", "data"}
    assert said == [] and browser.execute_script("return window.pwned") is None


def test_on_paper_everything_shows(browser, built):
    opened(browser, built[1])
    closed = "return [...document.querySelectorAll('details')].filter(d => !d.open).length"
    before = browser.execute_script(closed)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert before > 0 and browser.execute_script(closed) == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(closed) == before
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})["data"])
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2


def test_broken_panel_data_are_a_sentence(browser, built, tmp_path):
    folder = tmp_path / "mini"
    data = json.loads((built[0] / "explain" / "06_explainability_panel.json").read_text(encoding="utf-8"))
    data["images"][0]["winner"] = "AAAA"
    write_panel(folder / "explain" / "06_panel.json", data)
    path = build_report(folder, load_profile("mini"), None)
    browser.get(path.as_uri())

    assert wait(browser, lambda b: b.find_elements("css selector", ".panel .problem"))
    assert "cannot be read" in at(browser, ".panel").text
