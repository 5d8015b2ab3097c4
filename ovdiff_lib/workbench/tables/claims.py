"""The paper's claims about results, tested on the measured tables of a folder: what holds here, what fails, what cannot
be told.

``claims.csv`` says of every claim which cells are compared and how (:mod:`ovdiff_lib.workbench.tables.relations`). A
cell is written ``table|row|column``, the key that tables carry; ``{set}`` runs over the data sets of the column
``sets``, ``{rival}`` over the rivals that were measured, ``N=*`` over every N; ``a or b`` is the first of the two that
was measured; `` & `` separates cells.

Each data set gives a verdict of its own. The noise that differences are held against, and its reference, are those of
:mod:`ovdiff_lib.workbench.tables.relations`; the claims of :data:`SD_TABLES` have SD features alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas

from ovdiff_lib.errors import InputError
from ovdiff_lib.files import write_atomic
from ovdiff_lib.workbench.tables.relations import ORDER, RELATIONS, TOLERANCE, Part, Sample, Spread
from ovdiff_lib.workbench.tables.tables import STAMP, read_record, read_table

FOLDER = Path(__file__).parent
NAME = "claims"
VERDICTS = ("holds", "fails", "within noise", "not measured", "paper only")
RIVALS = {"{rival}": ("MaskCLIP", "ReCo", "CLIP-DIY", "GroupViT"),
          "{training-free rival}": ("MaskCLIP", "ReCo", "CLIP-DIY")}
NOT_COUNTED = ("00_", "01_")
"""Tables of these notebooks are introductions on one seed: they carry the paper's keys, and other notebooks measure the
same with care."""

SD_TABLES = ("3", "A.2sec-text", "A.4", "A.5", "A.6", "chatgpt", "fig5")
"""Tables of the paper, by the keys of cells, whose rows have SD features alone."""

REFERENCES = {False: ("OVDiff",), True: ("OVDiff, SD features", "OVDiff")}
"""Rows of Table 1 whose spread over seeds is the reference, the first that was measured, by whether a claim is about SD
features."""

LEGEND = (
    "A difference up to the noise decides nothing (within noise). The noise is twice the standard error of paired "
    "differences where both "
    "cells have runs of the same three or more seeds, else twice the largest of the standard deviations over seeds "
    "that are known: of the "
    "two cells, where they have two or more runs, and of OVDiff's own row of Table 1 with the same extractors on the "
    "same data set (also "
    f"for rivals, which have no seeds); {TOLERANCE} where none is known. A claim that something changes little holds "
    "up to a difference of "
    f"{TOLERANCE} % of mIoU, and fails beyond that and the noise. A claim about several data sets holds if it holds on "
    "each and fails if "
    "it fails on one; one about most of them fails where even the undecided ones would make no majority.")

FIELDS = ("id", "claim", "source", "paper", "measured", "verdict", "note", "how")
FIELDS_OF = [name.replace("paper", "paper_values") for name in FIELDS]
"""Columns of the file, and the fields of :class:`ClaimResult` in them."""


@dataclass(frozen=True)
class Claim:
    """A row of claims.csv; ``left`` and ``right`` are patterns of cells, ``missing`` the verdict where they are not
    measured."""

    id: int
    claim: str
    source: str
    relation: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    sets: tuple[str, ...]
    missing: str
    paper_values: str
    note: str


@dataclass(frozen=True)
class ClaimResult:
    """A tested claim: ``verdict`` is one of :data:`VERDICTS`, ``measured`` the numbers that were compared (data set by
    data set, mIoU in percent unless the claim is about times), ``how`` the noise they were held against, ``note`` what
    a reader should know."""

    id: int
    claim: str
    source: str
    paper_values: str
    measured: str
    verdict: str
    note: str
    how: str


@dataclass
class Evidence:
    """The measured cells of a folder by their key, and the profile that its tables name."""

    samples: dict[tuple[str, str, str], Sample] = field(default_factory=dict)
    # row, column of Table 1 -> standard deviation over seeds
    deviations: dict[tuple[str, str], float] = field(default_factory=dict)
    profile: str = ""

    def spread(self, name: str, sd: bool = False) -> Spread:
        """The reference's spread over seeds on a data set; for a variant without background (VOC-20) that of the data
        set itself."""
        for wanted in REFERENCES[sd]:
            found = next((std for (row, column),
                          std in self.deviations.items() if row == wanted and name.startswith(column)), None)
            if found is not None:
                return Spread(name, found, wanted)
        return Spread(name)


def claims() -> tuple[Claim, ...]:
    """All claims in order. Reads the file that ships with the package."""
    read = pandas.read_csv(FOLDER / "claims.csv", dtype=str, keep_default_na=False).to_dict("records")
    cells = {name: lambda text: tuple(filter(None, text.split(" & "))) for name in ("left", "right", "sets")}
    return tuple(Claim(**{name: {"id": int, **cells}.get(name, str)(text) for name, text in row.items()})
                 for row in read)


def judge(folder: str | Path) -> list[ClaimResult]:
    """Test every claim on the tables of ``folder``/tables: those that are not of notebooks 00 and 01, and of them the
    cells measured here.

    A claim about several data sets holds only if it holds on each of them; it fails if it fails on one. A folder
    without tables leaves every claim "not measured". Raises ``InputError`` for a table that cannot be read.
    """
    evidence = gather(Path(folder))
    return [_test(claim, evidence) for claim in claims()]


def gather(folder: Path) -> Evidence:
    """The measured cells of ``folder``/tables. Of a key in several tables the cell with the most runs counts, the first
    of equals."""
    evidence, sets = Evidence(), {name for claim in claims() for name in claim.sets}
    runs: dict[tuple[str, str, str], int] = {}
    for path in sorted((folder / "tables").glob("*.csv")):
        if path.stem == NAME or path.stem.startswith(NOT_COUNTED):
            continue
        record = read_record(path)
        evidence.profile = evidence.profile or str(record.get("profile", ""))
        seeds = (record.get("details") or {}).get("seeds") or ()
        for cell in read_table(path):
            if cell.paper is None or cell.source != "measured" or cell.n <= runs.get(cell.paper.key, 0):
                continue
            table, row, column = cell.paper.key
            runs[cell.paper.key] = cell.n
            label = ", ".join(part for part in (row, column) if part not in sets)
            known = tuple(seeds) if isinstance(seeds, list) and len(seeds) == len(cell.values) else ()
            evidence.samples[cell.paper.key] = Sample(label, cell.measured, cell.values, known, std=cell.std)
            if table == "1" and row in REFERENCES[True] and cell.std is not None:
                evidence.deviations[row, column] = cell.std
    return evidence


def write_claims(folder: str | Path) -> Path:
    """Judge and write ``folder``/tables/claims.csv, and claims.md with the counts by verdict at its head; returns the
    CSV's path."""
    results = judge(folder)
    path = Path(folder) / "tables" / f"{NAME}.csv"
    write_atomic(path, pandas.DataFrame(map(asdict, results), columns=FIELDS_OF).to_csv(
        index=False, lineterminator="\n", header=FIELDS).encode())
    write_atomic(path.with_suffix(".md"), _markdown(results).encode())
    return path


def counts(results: list[ClaimResult]) -> dict[str, int]:
    """How many claims have each verdict, in the order of :data:`VERDICTS`, zeros too."""
    return {verdict: sum(r.verdict == verdict for r in results) for verdict in VERDICTS}


def _test(claim: Claim, evidence: Evidence) -> ClaimResult:
    parts: dict[str, Part] = {}
    notes, absent = [claim.note], {}
    for name in claim.sets:
        left, right, unmeasured, missing = _cells(claim, name, evidence)
        if claim.missing == "paper only" and not missing and {(s.mean, s.values) for s in left} == {(s.mean, s.values)
                                                                                                    for s in right}:
            missing = f"a difference on {name}, where both sides are the same runs"
        part = None if missing else RELATIONS[claim.relation](left, right,
                                                              evidence.spread(name,
                                                                              claim.left[0].split("|")[0] in SD_TABLES))
        if part is None:
            absent[name] = missing or f"too few of {claim.left[0].replace('{set}', name)}"
        else:
            parts[name] = part
            notes.append(f"Rivals not measured: {', '.join(unmeasured)}." if unmeasured else "")
    verdict = _verdict(claim, list(parts.values()))
    several = len(claim.sets) > 1
    measured = _join((f"{name}: " if several else "") + part.measured for name, part in parts.items())
    if several and any(part.verdict != "holds" for part in parts.values()):
        notes.append(_each(parts, claim.relation))
    if absent and verdict in ("not measured", *ORDER):
        notes.append("Not measured: " + "; ".join(absent.values()) + ".")
    notes.append(_explanations().get((evidence.profile, claim.id, verdict), ""))
    return ClaimResult(claim.id, claim.claim, claim.source, claim.paper_values, measured, verdict,
                       " ".join(dict.fromkeys(filter(None, notes))), _join(h for p in parts.values() for h in p.how))


def _verdict(claim: Claim, parts: list[Part]) -> str:
    verdicts = [p.verdict for p in parts]
    if claim.relation.endswith("on most"):  # data sets that are not there do not count; one alone is no majority
        if len(parts) < 2:
            return claim.missing
        most = [2 * count > len(parts) for count in (verdicts.count("holds"), len(parts) - verdicts.count("fails"))]
        return "holds" if most[0] else "within noise" if most[1] else "fails"
    if "fails" in verdicts:
        return "fails"  # refuted, whatever the data sets that are not there would say
    return claim.missing if len(parts) < len(claim.sets) else min(verdicts, key=ORDER.index)


def _each(parts: dict[str, Part], relation: str) -> str:
    """The verdict of every data set as one sentence, so that none is hidden behind the claim's own."""
    words = {"holds": "leads", "fails": "loses"} if relation.endswith("on most") else {}
    said = []
    for verdict in dict.fromkeys(part.verdict for part in parts.values()):
        said.append(f"{words.get(verdict, verdict)} on "
                    f"{', '.join(n for n, part in parts.items() if part.verdict == verdict)}")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


def _cells(claim: Claim, name: str, evidence: Evidence) -> tuple[list[Sample], list[Sample], list[str], str]:
    """The cells of both sides on one data set, the rivals that are left out, and the key of a cell that is missing (""
    if none is)."""
    patterns = [p.replace("{set}", name) for p in (*claim.left, *claim.right)]
    holder = next((h for h in RIVALS if any(h in p for p in patterns)), None)
    present, unmeasured = [], []
    for rival in RIVALS.get(holder, ()):
        there = all(_find(p.replace(holder, rival), evidence) for p in patterns if holder in p)
        (present if there else unmeasured).append(rival)
    if holder and not present:
        return [], [], unmeasured, "any rival on " + name
    sides, missing = ([], []), ""
    for side, group in zip(sides, (claim.left, claim.right), strict=True):
        group = [p.replace("{set}", name) for p in group]
        for rival in present if holder and any(holder in p for p in group) else [""]:
            for pattern in group:
                found = _find(pattern.replace(holder, rival) if holder else pattern, evidence)
                missing = missing or ("" if found else pattern)
                side += found
    return *sides, unmeasured, missing


def _find(pattern: str, evidence: Evidence) -> list[Sample]:
    for option in pattern.split(" or "):
        key = tuple(option.split("|"))
        if "*" not in option:
            if key in evidence.samples:
                return [evidence.samples[key]]
            continue
        wanted = re.compile(re.escape(option).replace(r"\*", r"(\d+)"))
        matches = [(wanted.fullmatch("|".join(k)), s) for k, s in evidence.samples.items()]
        found = [Sample(f"N={m[1]}", s.mean, s.values, s.seeds, int(m[1]), s.std) for m, s in matches if m]
        if found:
            return found
    return []


@functools.cache
def _explanations() -> dict[tuple[str, int, str], str]:
    """Texts on results, written for one profile and one verdict: when the verdict changes, the text no longer shows."""
    read = pandas.read_csv(FOLDER / "explanations.csv", dtype={"id": int}, keep_default_na=False)
    table = {(row.profile, row.id, row.verdict): row.text for row in read.itertuples()}
    if unknown := sorted({verdict for _, _, verdict in table} - set(VERDICTS)):
        raise InputError(f"explanations.csv names the verdict {unknown[0]!r}; write one of {', '.join(VERDICTS)}.")
    return table


def _markdown(results: list[ClaimResult]) -> str:
    def escape(text: str) -> str:
        return text.replace("|", "\\|")

    head = ", ".join(f"{verdict} {number}" for verdict, number in counts(results).items())
    lines = [f"**The paper's {len(results)} claims on the tables of this folder: {head}.** {STAMP}", "",
             "| # | claim | source | paper | measured here | verdict | note |", "|---:|---|---|---|---|---|---|"]
    lines += [f"| {r.id} | " + " | ".join(map(escape, (r.claim, r.source, r.paper_values, r.measured or "-",
                                                       f"**{r.verdict}**", r.note)))
              + " |" for r in results]
    lines += ["", LEGEND]
    return "\n".join(lines) + "\n"


def _join(parts: Iterable[str]) -> str:
    """Texts once each, in order, as one."""
    return "; ".join(dict.fromkeys(filter(None, parts)))
