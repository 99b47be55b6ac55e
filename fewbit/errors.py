"""The one exception that users see: a line that says what is wrong, where, and what to do."""

import errno
import sys
from collections.abc import Iterator

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MEMORY_PHRASES = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "std::bad_alloc",
    "can't start new thread",
    "cublas_status_alloc_failed",
)
"""What torch, its allocators and the system say, in lower case, in a RuntimeError or an OSError."""


class FewbitError(Exception):
    """Bad input or an environment that cannot do what was asked.

    The command line prints the message as one line and exits with status 2.
    """


class WorkKeptError(FewbitError):
    """Something outside the run ended it: what is done is kept, and the same command goes on once that is put right."""


def missing_extra(package: str, extra: str) -> FewbitError:
    """The error for an optional dependency that is not installed, naming the extra that brings it.

    Called for one that is there and fails to be imported, it says so; too little memory is raised as what it is.
    """
    failed = sys.exc_info()[1]
    if not isinstance(failed, ImportError) or isinstance(failed, ModuleNotFoundError):
        return FewbitError(f"this needs the package {package}: install it with  pip install 'fewbit[{extra}]'")
    if is_out_of_memory(failed):
        raise failed
    return FewbitError(
        f"the package {package} cannot be imported ({failed}): install it again with  pip install -U 'fewbit[{extra}]'"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, says that memory ran out, on any device."""
    for one in _chain(error):
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError":
            return True
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return True
        # torch has no class of its own for the CPU's memory, and libraries wrap what the system says.
        if isinstance(one, RuntimeError | OSError | ImportError) or type(one).__name__ == "SafetensorError":
            text = str(one).lower()
            if any(phrase in text for phrase in _MEMORY_PHRASES):
                return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
