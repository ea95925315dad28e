"""The error that is the user's to mend: one sentence, exit code 2."""


class UsageError(Exception):
    """An option or a folder that the run cannot start with."""
