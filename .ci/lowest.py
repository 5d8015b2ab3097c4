"""Makes .venv-lowest, where `make test-lowest` runs: the lowest versions that pyproject.toml allows.

Run with .venv's Python. PyTorch and torchvision are those of .venv, and so is what the others need in turn: a second
PyTorch is a download of 3 GB. So this does not cover the floors of torch and torchvision; whoever moves those tries
them once in an environment of their own.
"""

import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

FOLDER = Path(".venv-lowest")
SHARED = {"torch", "torchvision"}

dependencies = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
lowest = [f"{requirement.name}=={bound.version}" for requirement in map(Requirement, dependencies)
          for bound in requirement.specifier if bound.operator == ">=" and requirement.name not in SHARED]
venv.create(FOLDER, clear=True, with_pip=True)
site = Path(sysconfig.get_path("purelib", "venv", {"base": str(FOLDER)}))
# Behind the folder's own packages on the path, so that the lowest versions win; addsitedir also finds the project
# installed in .venv.
(site / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n", encoding="utf-8")
# Without compiling, which takes twice as long and is thrown away.
pip = [FOLDER / "bin" / "python", "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check",
       "--no-compile"]
subprocess.run([*pip, *lowest], check=True)
