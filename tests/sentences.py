"""What an error says, asked of many: its class, one sentence, and the names that it must hold; options of a command line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def one_sentence(text: str) -> None:
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 600, repr(text)


@contextmanager
def refused(error: type[Exception], *names: str) -> Iterator[pytest.ExceptionInfo]:
    """The block raises ``error``, in one sentence for a user that holds all of ``names``."""
    with pytest.raises(error) as caught:
        yield caught
    text = str(caught.value)
    one_sentence(text)
    assert all(str(name) in text for name in names), f"{names} in: {text}"


def assigned(settings: dict) -> list[str]:
    """The options that replace profile fields."""
    return [option for key, value in settings.items() for option in ("--set", f"{key}={json.dumps(value)}")]
