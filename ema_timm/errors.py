"""Ends of a command that are not bugs: each message is one clear line, each has an exit code."""


class UserError(Exception):
    """Bad input (exit code 2). The message is one line: the rule, what came, the remedy."""


class UnreadableImageError(UserError):
    """An image of the data set cannot be decoded."""


class InterruptedRunError(Exception):
    """A run was asked to stop (exit code 130). The message says how to continue it."""


class HubError(Exception):
    """The Hub, or the way to it, failed (exit code 1). The message says where, and the remedy."""


class VerificationError(Exception):
    """What was made does not do what it must, and was not kept (exit code 1)."""
