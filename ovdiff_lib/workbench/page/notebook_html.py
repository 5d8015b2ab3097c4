"""Executed notebooks as pages that open from disk: nbconvert's cells, formulas drawn by matplotlib, and nothing from the network.

nbconvert's own page loads MathJax, require.js and mermaid from a content delivery network. Only its cells are taken here; the page around
them is the report's, and its content security policy forbids scripts and everything that is not in the file.
"""

from __future__ import annotations

import functools
import html
import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovdiff_lib.errors import InputError

SHOWN = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain"]
"""Forms of an output, best first; scripts and widgets are left out, since they would need a server."""

PROGRESS = re.compile(r"(?:\d%\|.*\||\d\w* )\s*\d*/?\d* ?\[\d\d:\d\d.*\]\s*$")
"""A line of tqdm: "name:  40%|####      | 8/20 [00:19<00:29,  2.4s/it]", or "8it [00:19,  2.4s/it]"."""

_INSIDE = r"""(?:"[^"]*"|'[^']*'|[^>"'])*?\s"""
LOADED = re.compile(rf"(<(?!a\b)[a-z]\w*\b{_INSIDE})(?:src|srcset|href|poster|data|background)\s*=(?!\s*[\"']?(?:data:|#))", re.I)
HANDLER = re.compile(rf"(<[a-z]\w*\b{_INSIDE})on\w+\s*=", re.I)
"""What a tag other than a link would load, and what it would run."""


def notebook_body(path: Path, hide: Callable[[str], str] = str) -> str:
    """The cells of an executed notebook as HTML without scripts. Raises ``InputError`` for a file that is no notebook.

    ``hide`` changes the file's text before it is read: it takes out the folders of the machine the notebook ran on.
    """
    import nbformat

    try:
        notebook = nbformat.reads(hide(path.read_text(encoding="utf-8")), 4)
        _describe_pictures(notebook)
        _settle_streams(notebook)
        return _at_rest(_exporter().from_notebook_node(notebook)[0])
    # A notebook may be broken in as many ways as JSON can; nbformat, nbconvert and Jinja each have their own exceptions.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"The executed notebook {path.name} cannot be shown ({reason}); run it again.") from None


@functools.cache
def _exporter():
    import nbconvert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from traitlets.config import Config

    class Renderer(IPythonRenderer):
        """Formulas become drawings; raw HTML, which a class name in a table could be, stays text."""

        def block_math(self, body: str) -> str:
            return f'<p class="display">{formula(body)}</p>'

        def inline_math(self, body: str) -> str:
            return formula(body)

    class Exporter(nbconvert.HTMLExporter):
        def default_filters(self):
            yield from super().default_filters()
            yield "markdown2html", lambda source: MarkdownWithMath(Renderer(escape=True, exclude_anchor_links=True)).render(source)

    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    exporter = Exporter(config=config, template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.log = logging.getLogger(__name__)
    return exporter


def _describe_pictures(notebook: Any) -> None:
    """Pictures among the outputs get the heading they stand under as their alternative text."""
    heading = "notebook"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = ([line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")] or [heading])[-1]
        elif cell.cell_type == "code":
            cell.metadata.setdefault("alt", f"Figure of the section “{heading}”.")


def _at_rest(body: str) -> str:
    """HTML that loads and runs nothing: no scripts, and addresses of pictures and the like only where the data are in the address.

    The page's policy forbids both anyway; but then a browser complains, and another program that opens the page may know no policies.
    """
    body = re.sub(r"<script\b.*?</script\s*>", "", body, flags=re.S | re.I)
    for pattern in (LOADED, HANDLER):
        while (changed := pattern.sub(r"\1data-left-out=", body)) != body:
            body = changed
    return body


def _settle_streams(notebook: Any) -> None:
    """Printed text as a terminal would show it in the end, without progress bars: they were of interest while it ran."""
    for cell in notebook.cells:
        outputs: list[Any] = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and outputs and outputs[-1].output_type == "stream" and outputs[-1].name == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                lines = output.text.replace("\r\n", "\n").split("\n")
                last = (next((part for part in reversed(line.split("\r")) if part.strip()), "") for line in lines)
                output.text = "\n".join(line for line in last if not PROGRESS.search(line))
        if cell.cell_type == "code":
            cell.outputs = [o for o in outputs if o.output_type != "stream" or o.text.strip()]


@functools.lru_cache(1024)
def formula(tex: str, size: float = 12) -> str:
    """A TeX formula as inline SVG in the text's colour, its TeX for screen readers; what matplotlib cannot set stays TeX."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser
    from matplotlib.textpath import TextPath

    text = f"${_known(' '.join(tex.split()))}$"
    font = FontProperties(size=size, math_fontfamily="stix")
    try:
        width, height, depth, *_ = MathTextParser("path").parse(text, 72, font)
        path = TextPath((0, 0), text, prop=font)
    except ValueError:
        return f'<code class="tex">{html.escape(tex.strip())}</code>'
    # One unit of room on every side: glyphs lean out of their boxes.
    across, down, em = width + 2, height + depth + 2, 1 / size
    return (f'<svg class="formula" role="img" aria-label="{html.escape(tex.strip())}" viewBox="-1 0 {across:.4g} {down:.4g}" '
            f'style="width:{across * em:.3f}em;height:{down * em:.3f}em;vertical-align:{-(depth + 1) * em:.3f}em">'
            f'<path fill="currentColor" d="{_drawn(path, height + 1)}"/></svg>')


def _known(tex: str) -> str:
    """TeX with the commands that matplotlib lacks written as those it has."""
    for lacking, known in ((r"\\[lr]Vert\b", r"\\Vert"), (r"\\[lr]vert\b", r"\\vert"), (r"\\[td]frac\b", r"\\frac"),
                           (r"\\(math[a-z]+|sqrt)\s+(\w)", r"\\\1{\2}")):
        tex = re.sub(lacking, known, tex)
    return tex


def _drawn(path: Any, top: float) -> str:
    """The outline of a matplotlib path as SVG, with y downwards from ``top``."""
    letters = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    steps = []
    for points, code in path.iter_segments(simplify=False, curves=True):
        numbers = itertools.chain.from_iterable((x, top - y) for x, y in zip(points[::2], points[1::2], strict=True))
        steps.append("Z" if code == 79 else letters[code] + " ".join(f"{n:.2f}".rstrip("0").rstrip(".") for n in numbers))
    return "".join(steps)
