"""Do the tests of the method notice a wrong line? Mutants of its steps, each with one operator, number or name changed.

    python tests/mutation.py [160]

Mutants lie evenly over the modules of :data:`STEPS`. Each is put into a copy of the tree, where the tests of its step run; what survives
them meets the tests of the whole method. Survivors are printed, to be looked at: a line that means the same, or a missing test. The exit
code is 1 if fewer than 90 % were killed. About an hour of one core, so no other run calls it; it forks, as Linux can.
"""

import contextlib
import keyword
import os
import random
import shutil
import signal
import sys
import tempfile
import tokenize
from pathlib import Path

import pytest

ROOT, STEPS = Path(__file__).parents[1], ("support", "masks", "prototypes", "filters", "matching")

SWAPS = {"<": "<=", ">": ">=", "==": "!=", "+": "-", "*": "/", "and": "or", "True": "False", "argmax": "argmin", "max": "min",
         "amax": "amin", "sum": "mean", "any": "all", "floor": "ceil", "maximum": "minimum"}
SWAPS |= {new: old for old, new in SWAPS.items()} | {"//": "/", "&": "|", "~": "", "not": "", "is": "is not", "in": "not in"}
"""What becomes what; a number becomes one more."""


def mutants(path: Path) -> list[tuple[str, str]]:
    """(place and new line, text of the module) of every mutant that is still Python; texts and docstrings are left alone."""
    text, found = path.read_text(encoding="utf-8"), []
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(iter(lines).__next__):
        number, ((row, start), (_, end)) = token.type == tokenize.NUMBER, token[2:4]
        variable = token.string.isidentifier() and not keyword.iskeyword(token.string) and not token.line[end:].startswith("(")
        if number or (token.string in SWAPS and not variable):
            old, new = lines[row - 1], f"({token.string} + 1)" if number else SWAPS[token.string]
            line = f"{old[:start]}{new}{old[end:]}"
            with contextlib.suppress(SyntaxError):
                compile(changed := "".join([*lines[:row - 1], line, *lines[row:]]), path.name, "exec")
                found.append((f"{path.relative_to(ROOT)}:{row}: {token.string} -> {new} in {line.strip()}", changed))
    return found


def passes(tests: str) -> bool:
    """Whether tests of the method pass, in a copy of this process; ten minutes are a failure too."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.alarm(600)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/method/{tests}"]))
    return os.waitpid(child, 0)[1] == 0


def enter(tree: Path) -> None:
    """Go into ``tree``, and import once what its tests import of other packages: most of the time of a short run."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ |= {"PYTHONPATH": str(tree), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        pytest.main(["--collect-only", "-p", "no:cacheprovider", "tests/method"])
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{tree}/"):
            del sys.modules[name]


def main(count: int = 160) -> int:
    every = [(path, *one) for step in STEPS for path in sorted((ROOT / "ovdiff_lib" / step).glob("*.py")) for one in mutants(path)]
    first, survivors = random.Random(0).random(), 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(ROOT, f"{folder}/tree", ignore=shutil.ignore_patterns("__pycache__", ".git", ".venv*")))
        enter(tree)
        if not passes(""):
            sys.exit("The tests of the method fail without any mutant; mend that first.")
        sys.dont_write_bytecode = True  # a mutant is younger than what was compiled of its module
        for path, change, text in (every[int((first + n) * len(every) / count)] for n in range(count)):
            place = tree / path.relative_to(ROOT)
            place.write_text(text, encoding="utf-8")
            if passes(f"test_{path.parent.name}.py") and passes(""):
                survivors += 1
                print(f"survived: {change}", flush=True)
            shutil.copy2(path, place)
    print(f"killed {count - survivors} of {count}, chosen of {len(every)} mutants")
    return survivors > count / 10


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
