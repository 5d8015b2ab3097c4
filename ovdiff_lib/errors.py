"""Errors a user can cause. Each carries one sentence: what was wrong, what would be right, what to do."""

import difflib
from collections.abc import Iterable


class OVDiffError(Exception):
    """Base of every error the command line prints as one sentence (exit code 2) instead of a traceback."""


class InputError(OVDiffError, ValueError):
    """A bad image, vocabulary, parameter or file from the user."""


class ProfileError(OVDiffError, ValueError):
    """An unknown profile, an unknown field or a value of the wrong type."""


class ModelNotAvailable(OVDiffError, RuntimeError):
    """Weights that are not on this machine; the message names the model, where it was looked for, and how to get it."""


def legal(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about a ``word`` that is none of ``words``: those, and which of them may be meant."""
    near = difflib.get_close_matches(word.lower(), words, 1)
    return f"the legal ones are {', '.join(words)}.{f' Did you mean {near[0]!r}?' if near else ''}"
