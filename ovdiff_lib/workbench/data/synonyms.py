"""Other words for the classes of the data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass



def synonyms() -> dict[str, list[str]]:
    """Synonyms and subclasses of the classes of Pascal VOC and of the mini world that have some, by name and by prompt."""
    return json.loads(Path(__file__).with_name("synonyms.json").read_text(encoding="utf-8"))["words"]
