"""The paper's claims about results, tested on the measured tables of a folder: what holds, fails, cannot be told.

``claims.csv`` says of every claim which cells are compared and how (:mod:`ovdiff_lib.workbench.tables.relations`). A
cell is written ``table|row|column``, the key that tables carry; ``{set}`` runs over the data sets of the column
``sets``, each with a verdict of its own, ``{rival}`` over the rivals that were measured, ``N=*`` over every N;
``a or b`` is the first of the two that was measured; `` & `` separates cells.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas

from ovdiff_lib.files import write_atomic
from ovdiff_lib.workbench.tables.intervals import holm, read_runs
from ovdiff_lib.workbench.tables.relations import LEGEND, ORDER, Measured, Outcome, outcome
from ovdiff_lib.workbench.tables.tables import NOT_EXERCISED, STAMP, escape, read_record, read_table

FOLDER = Path(__file__).parent
NAME = "claims"
VERDICTS = ("holds", "fails", "within noise", NOT_EXERCISED, "not measured", "paper only")
RIVALS = {"{rival}": ("MaskCLIP", "ReCo", "CLIP-DIY", "GroupViT"),
          "{training-free rival}": ("MaskCLIP", "ReCo", "CLIP-DIY")}
NOT_COUNTED = ("00_", "01_")
"""Tables of these notebooks are introductions on one seed; other notebooks measure the same cells with care."""


@dataclass(frozen=True)
class ClaimResult:
    """A tested claim."""

    id: int
    claim: str
    source: str
    paper: str
    measured: str  # the numbers that were compared: mIoU in percent, or times
    verdict: str  # of VERDICTS
    note: str  # what a reader should know
    how: str  # what the verdict stands on


@functools.cache
def claims() -> tuple[Any, ...]:
    """All claims in order: the rows of claims.csv, ``left``, ``right`` and ``sets`` as tuples; ``missing`` is the
    verdict without the cells, ``paper`` the paper's own numbers, ``other`` the cell of another reading."""
    cells = dict.fromkeys(("left", "right", "sets"), lambda text: tuple(filter(None, text.split(" & "))))
    read = pandas.read_csv(FOLDER / "claims.csv", dtype={"id": int}, converters=cells, keep_default_na=False)
    return tuple(read.itertuples(index=False, name="Claim"))


def judge(folder: str | Path) -> list[ClaimResult]:
    """Test every claim on the tables of ``folder``/tables. Raises ``InputError`` for one that cannot be read."""
    samples, profile = gather(Path(folder))
    tested = [_Test(claim, samples) for claim in claims()]
    compared = [one for test in tested for part in test.parts.values() for one in part.comparisons if one.exercised]
    for one, corrected in zip(compared, holm([one.p for one in compared]), strict=True):
        one.corrected = corrected
    return [test.result(profile) for test in tested]


def gather(folder: Path) -> tuple[dict[str, Measured], str]:
    """The cells measured here in ``folder``/tables by their key ("table|row|column"), of several with one key that of
    most runs, the first of equals, labelled as in the paper but for the segmenter used; and the tables' profile."""
    sets, found, profile = {name for claim in claims() for name in claim.sets}, [], ""
    for path in sorted((folder / "tables").glob("*.csv")):
        if path.stem != NAME and not path.stem.startswith(NOT_COUNTED):
            record, runs = read_record(path), read_runs(path)
            profile, segmenter = profile or str(record.get("profile", "")), str(record.get("segmenter", "cutler"))
            found += [(cell, runs.get((cell.row, cell.column)), segmenter.replace("cutler", "CutLER"))
                      for cell in read_table(path) if cell.paper and cell.source == "measured"]
    samples = {}
    for cell, runs, segmenter in sorted(found, key=lambda one: -one[0].n):
        key, label = "|".join(cell.paper.key), ", ".join(part for part in cell.paper.key[1:] if part not in sets)
        if key not in samples:
            draws, label = runs.draws if runs and runs.images > 1 else None, label.replace("CutLER", segmenter)
            samples[key] = Measured(label, cell.measured, draws, cell.n, cell.note)
    return samples, profile


def find(samples: dict[str, Measured], pattern: str) -> list[Measured]:
    """The cells of a pattern, of the first of its alternatives that was measured."""
    for option in pattern.split(" or "):
        if option in samples:
            return [samples[option]]
        wanted = re.compile(re.escape(option).replace(r"\*", r"(\d+)"))
        found = [(wanted.fullmatch(key), sample) for key, sample in samples.items() if "*" in option]
        if counted := [replace(s, label=f"N={match[1]}", count=int(match[1])) for match, s in found if match]:
            return counted
    return []


def write_claims(folder: str | Path) -> Path:
    """Judge and write ``folder``/tables/claims.csv (its path is returned), and claims.md with the counts by verdict."""
    results, path = judge(folder), Path(folder) / "tables" / f"{NAME}.csv"
    write_atomic(path, pandas.DataFrame(results).to_csv(index=False, lineterminator="\n").encode())
    write_atomic(path.with_suffix(".md"), _markdown(results).encode())
    return path


def counts(results: list[ClaimResult]) -> dict[str, int]:
    """How many claims have each verdict, in the order of :data:`VERDICTS`, zeros too."""
    return {verdict: sum(r.verdict == verdict for r in results) for verdict in VERDICTS}


class _Test:
    """A claim on the data sets for which there is what it compares."""

    def __init__(self, claim: Any, samples: dict[str, Measured]) -> None:
        self.claim, self.parts, self.notes, self.absent, self.cells = claim, {}, [claim.note], [], []
        for name in claim.sets:
            left, right, unmeasured, missing = _cells(claim, name, samples)
            if not missing and (part := outcome(claim.relation, left, right)):
                self.parts[name], self.cells = part, [*self.cells, *left, *right]
                self.notes += [f"Rivals not measured: {', '.join(unmeasured)}."] if unmeasured else []
            else:
                self.absent.append(missing or f"too few of {claim.left[0].replace('{set}', name)}")
        for other in find(samples, claim.other) if self.parts else ():
            self.notes.append(f"The other reading on {claim.other.split('|')[-1]}: {other.label} {other.mean:.1f}.")

    def result(self, profile: str) -> ClaimResult:
        """The claim as it was found, once the comparisons know their corrected p-values."""
        claim, parts, notes, several = self.claim, self.parts, self.notes, len(self.claim.sets) > 1
        verdict = _verdict(claim, [part.verdict for part in parts.values()])
        own = [cell for cell in self.cells if cell.draws is not None and not cell.label.startswith(RIVALS["{rival}"])]
        if single := list(dict.fromkeys(cell.label for cell in own if cell.seeds == 1)):
            notes.append("One seed" + f": {', '.join(single)}" * any(cell.seeds > 1 for cell in own) + ".")
        if several and any(part.verdict != "holds" for part in parts.values()):
            notes.append(_each(parts, claim.relation))
        if self.absent and verdict != "paper only":
            notes.append("Not measured: " + "; ".join(self.absent) + ".")
        notes.append(_explanations().get((profile, claim.id, verdict), ""))
        measured = _join((f"{name}: " if several else "") + part.measured for name, part in parts.items())
        how = _join(part.how for part in parts.values())
        return ClaimResult(claim.id, claim.claim, claim.source, claim.paper, measured, verdict, _join(notes, " "), how)


def _verdict(claim: Any, verdicts: list[str]) -> str:
    if claim.relation.endswith("on most"):  # data sets that are not there do not count; one alone is no majority
        if len(verdicts) < 2:
            return claim.missing
        half, fails = len(verdicts) / 2, verdicts.count("fails")
        return "holds" if verdicts.count("holds") > half else "within noise" if fails < half else "fails"
    if "fails" in verdicts:
        return "fails"  # refuted, whatever the data sets that are not there would say
    return claim.missing if len(verdicts) < len(claim.sets) else min(verdicts, key=ORDER.index)


def _each(parts: dict[str, Outcome], relation: str) -> str:
    """The verdict of every data set as one sentence, so that none is hidden behind the claim's own."""
    words = {"holds": "leads", "fails": "loses"} if relation.endswith("on most") else {}
    verdicts = {name: words.get(part.verdict, part.verdict) for name, part in parts.items()}
    text = "; ".join(f"{word} on {', '.join(name for name, said in verdicts.items() if said == word)}"
                     for word in dict.fromkeys(verdicts.values()))
    return f"{text[0].upper()}{text[1:]}."


def _cells(claim: Any, name: str, samples: dict[str, Measured]) -> tuple[list, list, list[str], str]:
    """The cells of both sides on one data set, the rivals that are left out, and the key of a cell that is missing."""
    sides = [[pattern.replace("{set}", name) for pattern in side] for side in (claim.left, claim.right)]
    patterns, unmeasured = sides[0] + sides[1], []
    if holder := next((holder for holder in RIVALS if any(holder in pattern for pattern in patterns)), ""):
        unmeasured = [rival for rival in RIVALS[holder]
                      if not all(find(samples, p.replace(holder, rival)) for p in patterns if holder in p)]
        rivals = [rival for rival in RIVALS[holder] if rival not in unmeasured]
        if not rivals:
            return [], [], unmeasured, f"any rival on {name}"
        sides = [dict.fromkeys(p.replace(holder, rival) for rival in rivals for p in side) for side in sides]
    missing = next((pattern for side in sides for pattern in side if not find(samples, pattern)), "")
    left, right = ([sample for pattern in side for sample in find(samples, pattern)] for side in sides)
    if claim.relation != "linear" and not missing:
        missing = next((f"the counts by image of {sample.label} on {name}"
                        for sample in (*left, *right) if sample.draws is None), "")
    return left, right, unmeasured, missing


@functools.cache
def _explanations() -> dict[tuple[str, int, str], str]:
    """Texts on results, written for one profile and one verdict: when the verdict changes, the text no longer shows."""
    read = pandas.read_csv(FOLDER / "explanations.csv", dtype={"id": int}, keep_default_na=False)
    return {(row.profile, row.id, row.verdict): row.text for row in read.itertuples()}


def _markdown(results: list[ClaimResult]) -> str:
    head = ", ".join(f"{verdict} {number}" for verdict, number in counts(results).items())
    lines = [f"**The paper's {len(results)} claims on the tables of this folder: {head}.** {STAMP}", "",
             "| # | claim | source | paper | measured here | verdict | note |", "|---:|---|---|---|---|---|---|"]
    lines += [f"| {r.id} | {escape(r.claim)} | {r.source} | {r.paper} | {escape(r.measured) or '-'} | **{r.verdict}** |"
              f" {escape(r.note)} |" for r in results]
    return "\n".join([*lines, "", LEGEND]) + "\n"


def _join(parts: Iterable[str], between: str = "; ") -> str:
    """Texts once each, in order, as one."""
    return between.join(dict.fromkeys(filter(None, parts)))
