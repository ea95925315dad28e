"""The errors that are one sentence on the command line, without a traceback."""


class UsageError(Exception):
    """An option or a folder that the run cannot start with; exit code 2."""


class RunError(Exception):
    """What has stopped a run that had begun; exit code 1."""
