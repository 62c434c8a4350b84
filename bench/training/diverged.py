"""How a training ends whose weights or loss are no longer finite."""

DIVERGED = 3  # the command's exit code


class Diverged(Exception):
    """One sentence: which training, in which epoch, and what to try."""
