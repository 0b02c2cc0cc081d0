"""The error of every file that cannot be used."""


class CheckpointError(ValueError):
    """A file that cannot be used: which one, and why."""
