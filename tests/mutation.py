"""Do the tests of the method notice a wrong line? Mutants of its modules, each with one operator or number changed.

    python tests/mutation.py --count 150 --seed 0 [--only matching] [--workers 2]

A mutant is killed when a test of `tests/method` fails on it: first those named after its module, then all of them. Survivors are
printed with the line that was changed; the exit code is 1 if fewer than 90 % were killed. Minutes to hours: not part of any other run.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
STEPS = {"support": "support pipeline", "masks": "masks segmenters maskcut detector", "prototypes": "prototypes clustering",
         "filters": "filters", "matching": "matching refine"}
"""The steps that are mutated and the test files that are tried first."""

OPERATORS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn,
             ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div,
             ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
NAMES = {"argmax": "argmin", "max": "min", "min": "max", "amax": "amin", "sum": "mean", "mean": "sum", "any": "all", "all": "any",
         "floor": "ceil", "ceil": "floor", "maximum": "minimum", "minimum": "maximum"}


def mutated(node: ast.AST) -> ast.AST | None:
    """The node with one thing changed, None where there is nothing to change."""
    node = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        node.ops[0] = OPERATORS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += 1
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        node = node.operand
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        node.attr = NAMES[node.attr]
    elif isinstance(node, ast.Name) and node.id in NAMES:
        node.id = NAMES[node.id]
    else:
        return None
    return node


def mutants(path: Path) -> list[tuple[int, str]]:
    """(line, text of the module) of every mutant; annotations, messages of errors and defaults of keywords in them are left alone."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    skipped = {id(part) for node in ast.walk(tree) if isinstance(node, ast.Raise | ast.AnnAssign | ast.arguments | ast.JoinedStr)
               for part in ast.walk(node)}
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            for place, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.expr) or id(child) in skipped or (changed := mutated(child)) is None:
                    continue
                siblings = list(value) if isinstance(value, list) else None
                setattr(node, field, [*siblings[:place], changed, *siblings[place + 1:]] if siblings else changed)
                found.append((child.lineno, ast.unparse(tree)))
                setattr(node, field, value)
    return found


def killed(package: Path, name: str, text: str, tests: list[str]) -> bool:
    """Whether a test fails with the module ``name`` of the copied package replaced by ``text``."""
    place = package / "ovdiff_lib" / name
    kept = place.read_text(encoding="utf-8")
    place.write_text(text, encoding="utf-8")
    try:
        for files in (tests, [str(ROOT / "tests" / "method")]):
            if not files:
                continue
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
            try:
                run = subprocess.run(command, cwd=package, capture_output=True, timeout=900,
                                     env={**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"})
            except subprocess.TimeoutExpired:
                return True
            if run.returncode:
                return True
        return False
    finally:
        place.write_text(kept, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=STEPS, action="append", help="a step; default: all")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    every = [(step, path, line, text) for step in options.only or STEPS
             for path in sorted((ROOT / "ovdiff_lib" / step).glob("*.py")) for line, text in mutants(path)]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(chosen)} of {len(every)} mutants")
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / str(n) for n in range(options.workers)]
        for place in copies:
            shutil.copytree(ROOT / "ovdiff_lib", place / "ovdiff_lib", ignore=shutil.ignore_patterns("__pycache__", "weights", "data"))
            for data in ("mini/weights", "mini/data", "workbench/data"):  # read only, or code that is not mutated
                shutil.rmtree(place / "ovdiff_lib" / data, ignore_errors=True)
                (place / "ovdiff_lib" / data).symlink_to(ROOT / "ovdiff_lib" / data)

        def judge(number: int) -> int:
            """How many of every ``workers``-th mutant were killed, in a copy of the package that no other thread uses."""
            dead = 0
            for step, path, line, text in chosen[number :: options.workers]:
                tests = [str(ROOT / "tests" / "method" / f"test_{name}.py") for name in STEPS[step].split()]
                if killed(copies[number], path.relative_to(ROOT / "ovdiff_lib").as_posix(), text, tests):
                    dead += 1
                else:
                    plain = ast.unparse(ast.parse(path.read_text(encoding="utf-8"))).splitlines()
                    changed = next((new for old, new in zip(plain, text.splitlines(), strict=False) if old != new), "")
                    bar.write(f"survived: {path.relative_to(ROOT)}:{line}: {changed.strip()}")
                bar.update()
            return dead

        if killed(copies[0], "errors.py", (ROOT / "ovdiff_lib" / "errors.py").read_text(encoding="utf-8"), []):
            sys.exit("The tests of the method fail without any mutant; mend that first.")
        with tqdm(total=len(chosen), unit="mutant") as bar, ThreadPoolExecutor(options.workers) as pool:
            share = sum(pool.map(judge, range(options.workers))) / len(chosen)
    print(f"killed {share:.0%}")
    return share < 0.9


if __name__ == "__main__":
    sys.exit(main())
