"""What is done also where a Ctrl-C comes."""

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def surely(call: Callable[[], Result], then: Callable[[], None]) -> Result:
    """Call, and do what comes after it, also where a Ctrl-C comes at any line of the two: `then` is
    begun twice, so it has to come to the same where it was done before, or in part."""
    try:
        try:
            return call()
        finally:
            then()
    finally:
        then()
