"""What a misspelt word was meant to be."""

from collections.abc import Iterable
from difflib import get_close_matches


def meant(word: object, known: Iterable[str]) -> str:
    """Return " (did you mean 'cosine'?)" for "cosin", "" where no known word is near."""
    names = {name.lower(): name for name in known}  # as "SAM" is nowhere near "sam"
    near = get_close_matches(str(word).lower(), list(names), n=1)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""
