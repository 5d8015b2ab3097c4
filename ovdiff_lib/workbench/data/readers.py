"""How data sets lie in folders: where their images and label maps are, and what the values of a label map mean."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ovdiff_lib.errors import InputError

MINI_DATA = Path(__file__).parents[2] / "mini" / "data"


@dataclass(frozen=True)
class File:
    """One image and its label map."""

    id: str
    image: Path
    labels: Path


@dataclass(frozen=True)
class Layout:
    """How the data set ``what`` lies in its folder, or in one of ``places`` below it.

    ``images`` and ``labels`` are paths from there, with ``{split}`` and ``{id}``: the first counts whose folder exists.
    ``values`` are what a label map holds, and the label of each, 0 = background. ``splits`` names the splits' folders;
    ``ids(home, split)`` lists the images, default: all that have an image or label map, ``any_id`` being an id as glob.
    ``hint`` says how label maps are come by; ``shipped`` is where the package has the data.
    """

    what: str
    places: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    values: dict[int, int]
    splits: dict[str, str] | None = None
    ids: Callable[[Path, str], list[str]] | None = None
    any_id: str = "*"
    hint: str = "unpack it again"
    shipped: Path | None = None

    def home(self, root: Path, split: str) -> Path:
        """The place below ``root`` that has images. Raises ``InputError`` if there is none."""
        for place in self.places:
            if _present(root / place, self.images, split):
                return root / place
        looked = ", ".join(filter(None, self.places))
        raise InputError(f"{root} does not hold {self.what}: looked for the folder {_folders(self.images, split)} in it"
                         f" and in {looked}; give the folder that the archive was unpacked to.")

    def files(self, root: Path, split: str) -> list[File]:
        """The images of a split, also those of which only the image or only the label map is there."""
        if self.splits is not None and split not in self.splits:
            raise InputError(f"{self.what} has no split {split!r} with labels; choose one of {', '.join(self.splits)}.")
        split = self.splits[split] if self.splits else split
        home = self.home(root, split)
        image, labels = (_present(home, paths, split) for paths in (self.images, self.labels))
        if not labels:
            raise InputError(f"{home} has no label maps of {self.what} ({_folders(self.labels, split)}); {self.hint}.")
        listed = self.ids(home, split) if self.ids else sorted(self._found(home, image) | self._found(home, labels))
        return [File(i.rpartition("/")[2], *(home / path.format(id=i) for path in (image, labels))) for i in listed]

    def _found(self, home: Path, path: str) -> set[str]:
        before, after = path.split("{id}")
        found = home.glob(path.format(id=self.any_id))
        return {file.relative_to(home).as_posix()[len(before):-len(after)] for file in found}


def _present(home: Path, paths: tuple[str, ...], split: str) -> str:
    """The first of the paths whose folder there is, with its ``{id}`` left open; "" if there is none."""
    named = [path.replace("{split}", split) for path in paths]
    return next((path for path in named if (home / path.split("{id}")[0]).is_dir()), "")


def _folders(paths: tuple[str, ...], split: str) -> str:
    return " or ".join(path.replace("{split}", split).split("{id}")[0] for path in paths)
