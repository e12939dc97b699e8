"""The base of errors that a command prints as one line."""


class UserError(RuntimeError):
    """An expected failure; its message says what is wrong and what to do about it."""
