"""The one kind of failure that a person can repair: it names the place, the value and the repair."""

from __future__ import annotations

import errno

from pipeline.job.printable import printable


class JobError(Exception):
    """Something the user can repair. Shown without a traceback; the command exits with code 2.

    The message reads ``where: what is wrong, with the value. What to do.``

    Args:
        everywhere: all ranks raise it together, so that one of them can speak for all.
    """

    def __init__(self, message: str = "", everywhere: bool = False) -> None:
        super().__init__(printable(message))
        self.everywhere = everywhere


def of_system(error: OSError) -> str | None:
    """What the system refuses and the person can repair, in one line; None where it is something else."""
    space = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE)
    permission = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
    place = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
    repairable = space + permission + place
    if error.errno not in repairable:
        return None
    return printable(f"{error.filename or 'writing'}: {error.strerror}. Make room or choose another place, then run again.")


class Diverged(Exception):
    """Training produced numbers that are not finite. The command exits with code 4."""


class Stopped(Exception):
    """Training ended early because it was asked to; everything is saved. The command exits with code 75."""
