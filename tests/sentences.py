"""What an error says, asked of many: its class, one sentence, and the names that it must hold."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(error: type[Exception], *names: str) -> Iterator[None]:
    """The block raises ``error``, in one sentence for a user that holds all of ``names``."""
    with pytest.raises(error) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")), text
    assert all(str(name) in text for name in names), f"{names} in: {text}"
