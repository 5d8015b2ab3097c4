"""What a notebook leaves behind: tables and figures, each in one short call."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from IPython.display import Markdown

from ovdiff_lib.profiles.schema import Profile
from ovdiff_lib.workbench.evaluation.bench import Bench
from ovdiff_lib.workbench.figures.base import save_figure
from ovdiff_lib.workbench.tables.tables import Cell, write_table


class Page:
    """Saves a notebook's tables and figures in ``output``/tables and ``output``/figures, and shows them. Said once:
    that folder, the profile that made the numbers, and more for a table's record, as ``images=64, seeds=[0, 1]``."""

    def __init__(self, output: str | Path, profile: Profile, **details: Any) -> None:
        self.output, self.profile, self.details = Path(output), profile, details

    @classmethod
    def of(cls, output: str | Path, bench: Bench, sources: Iterable[str]) -> Self:
        """The page of a bench: its profile, its seeds, and of each data set as many images as it measures."""
        images = {source: min(bench.images or 10**9, len(bench.dataset(source))) for source in sources}
        return cls(output, bench.profile, images=images, seeds=list(bench.seeds))

    def table(self, cells: list[Cell], name: str, caption: str, digits: int | dict[str, int] = 1, *, title: str = "",
              **details: Any) -> Markdown:
        """Write the table ``name`` (``write_table``) and show it; ``details`` replace the page's, None omits one."""
        kept = {key: value for key, value in {**self.details, **details}.items() if value is not None}
        path = self.output / "tables" / f"{name}.csv"
        return Markdown(write_table(path, name, cells, self.profile, caption, digits, title=title, details=kept))

    def figure(self, figure: Any, name: str, caption: str, seed: int | None = None) -> Any:
        """Write the figure ``name``, its caption ended by the profile and the seed, and return it, to be shown."""
        of = f"Profile {self.profile.name}" + (f", seed {seed}" if seed is not None else "")
        save_figure(figure, self.output / "figures" / f"{name}.png", f"{caption} {of}.")
        return figure
