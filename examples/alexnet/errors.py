"""Errors that the command line prints as one sentence, without a traceback."""


class UsageError(Exception):
    """The run cannot start with an option or a folder. The exit code is 2."""


class RunError(Exception):
    """A run that had begun cannot go on. The exit code is 1."""
