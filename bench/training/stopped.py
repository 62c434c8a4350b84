"""How runs end before their last epoch that can go on."""

import signal

TERMINATED = 128 + signal.SIGTERM  # the command's exit code, as shells give it


class Stopped(Exception):
    """A run that ended before its last epoch, with all that it needs to go on in last.pt."""


class Terminated(Stopped):
    """By SIGTERM, of several runs."""
