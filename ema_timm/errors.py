"""Errors that are the caller's to mend: one clear line, exit code 2."""


class UserError(Exception):
    """Bad input. The message is one line: the rule, what came, the remedy."""


class UnreadableImageError(UserError):
    """An image of the data set cannot be decoded."""
