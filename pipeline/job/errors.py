"""The one kind of failure that a person can repair: it names the place, the value and the repair."""


class JobError(Exception):
    """Something the user can repair. Shown without a traceback; the command exits with code 2.

    The message reads ``where: what is wrong, with the value. What to do.``
    """


class Diverged(Exception):
    """Training produced numbers that are not finite. The command exits with code 4."""
