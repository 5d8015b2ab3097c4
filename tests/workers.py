"""Workers of the tests of engines: in a module of their own, that the processes which import it begin at once."""

import os
import signal
import time
from pathlib import Path

from ovdiff_lib.errors import InputError


class Inverse:
    """A worker: 12 / task. Fails in Python at 0, by the user's fault below, and leaves a file for each time it was made in a process."""

    def __init__(self, folder: Path) -> None:
        (folder / f"made-{os.getpid()}").touch(exist_ok=False)

    def __call__(self, task: int) -> tuple[float, int]:
        if task < 0:
            raise InputError(f"The number {task} is negative; give a positive one.")
        if task == 99:
            return lambda: task  # not a result that can travel
        return 12 / task, os.getpid()


class Fatal:
    """A worker: 2 x task, which the system kills at task 3 the first time, and at task 13 every time."""

    def __init__(self, folder: Path) -> None:
        self.killed = folder / "killed"

    def __call__(self, task: int) -> int:
        if task == 13 or (task == 3 and not self.killed.exists()):
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * task


class Slow:
    """A worker that takes task seconds."""

    def __call__(self, task: int) -> None:
        time.sleep(task)
