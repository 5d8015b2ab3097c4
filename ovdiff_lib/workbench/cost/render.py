"""The benchmark's rows as text and as plain data."""

from __future__ import annotations

import math
from typing import Any

from ovdiff_lib.files import size_text
from ovdiff_lib.workbench.cost.catalogue import Outcome, Row
from ovdiff_lib.workbench.cost.estimates import Estimate
from ovdiff_lib.workbench.cost.growth import Growth
from ovdiff_lib.workbench.cost.ratio import AT_LEAST, Ratio

HEADER = f"{'name':38} {'ovdiff':>9} {'other':>9} {'added':>9} {'other':>9} {'peak':>9} {'other':>9}  {'ratio':24} {'bound':9} result"
RESULT = {True: "met", False: "MISSED", None: "-"}


def render(outcome: Outcome) -> str:
    """A scenario's rows, each a line of numbers and under it what was measured against what."""
    if outcome.error:
        return f"{outcome.name}: FAILED: {outcome.error}"
    return "\n".join(line for row in outcome.rows for line in _lines(row))


def _lines(row: Row) -> list[str]:
    if isinstance(row, Growth):
        return _growth_lines(row)
    return _ratio_lines(row) if isinstance(row, Ratio) else [_estimate_line(row)]


def _ratio_lines(row: Ratio) -> list[str]:
    memory = " ".join(f"{size_text(amount):>9}" for amount in (row.ours.memory, row.theirs.memory, row.ours.whole, row.theirs.whole))
    numbers = (f"{row.name:38} {seconds_text(row.ours.median):>9} {seconds_text(row.theirs.median):>9} {memory}  {ratio_text(row):24} "
               f"{row.bound or '-'!s:9} {RESULT[row.met]}")
    lines = [numbers, f"    {row.measures}", f"    against {row.alternative}"]
    lines += [f"    {check.what}: {check.value:.3g}, at most {check.limit:g}: {RESULT[check.met]}" for check in row.checks]
    return lines + [f"    {row.note}"] * bool(row.note)


def ratio_text(row: Ratio) -> str:
    """The ratio with its spread over rounds, and what it is of: "1.08x (1.05-1.11)", "12x faster", "0.31x the memory"."""
    faster = row.bound is not None and row.bound.sense == AT_LEAST
    spread = f" ({row.spread[0]:.3g}-{row.spread[1]:.3g})" if row.spread else ""
    return f"{row.value:.3g}x{' faster' * faster}{' the memory' * (row.by == 'memory')}{spread}"


def _growth_lines(row: Growth) -> list[str]:
    held = row.bytes or (None,) * len(row.points)
    lines = [f"growth with {row.size}: {row.what}: {row.fit.slope:.3g} s x {row.name} + {row.fit.intercept:.3g} s, R2 = {row.fit.r2:.4f}"]
    for (size, step), of in zip(row.points, held, strict=True):
        inputs = f", inputs {size_text(of)}" if of is not None else ""
        lines.append(f"    {size:6} {seconds_text(step.median):>9}  ({seconds_text(min(step.seconds))}-{seconds_text(max(step.seconds))}), "
                     f"added {size_text(step.peak - step.held)}{inputs}")
    return lines


def _estimate_line(row: Estimate) -> str:
    def amount(value: float) -> str:
        return size_text(int(value)) if row.unit == "bytes" else f"{value / 1e9:,.1f} GFLOP"

    ran = f"; the profile's took {seconds_text(row.seconds)}, {row.rate / 1e9:.1f} GFLOP/s" if row.rate else ""
    here = f": at that rate the paper's would take {seconds_text(row.paper_seconds)} here" if row.rate else ""
    return f"estimate, {row.name}: profile {amount(row.profile)}, paper's size {amount(row.paper)}{ran}{here}"


def seconds_text(seconds: float) -> str:
    """Seconds as a person reads them."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.{3 - len(str(int(seconds / scale))) if seconds < 100 * scale else 0}f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def record(outcome: Outcome) -> dict[str, Any]:
    """A scenario's outcome as plain data for JSON; numbers that are not finite become null."""
    return {"scenario": outcome.name, "passed": outcome.passed, "error": outcome.error, "seconds": outcome.seconds,
            "ratios": [_ratio_record(row) for row in outcome.ratios],
            "growth": [point for row in outcome.rows if isinstance(row, Growth) for point in row.rows],
            "fits": {row.name: {"slope": row.fit.slope, "intercept": row.fit.intercept, "r2": _finite(row.fit.r2)}
                     for row in outcome.rows if isinstance(row, Growth)},
            "estimates": [{"name": row.name, "unit": row.unit, "profile": row.profile, "published": row.paper, "seconds": row.seconds}
                          for row in outcome.rows if isinstance(row, Estimate)]}


def _ratio_record(row: Ratio) -> dict[str, Any]:
    sides = {key: {"seconds": side.seconds, "median": side.median, "added": side.peak, "whole": side.whole, "device": side.device}
             for key, side in (("ours", row.ours), ("theirs", row.theirs))}
    bound = {"limit": row.bound.limit, "sense": row.bound.sense} if row.bound else None
    checks = [{"what": c.what, "value": _finite(c.value), "limit": c.limit, "met": c.met} for c in row.checks]
    return {"name": row.name, "measures": row.measures, "alternative": row.alternative, **sides, "by": row.by, "ratio": _finite(row.value),
            "spread": row.spread, "bound": bound, "checks": checks, "met": row.met, "note": row.note}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
