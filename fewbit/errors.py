"""The exception that users see: one line that says what is wrong, where, and what to do."""

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
    """Bad input, or an environment in which the request cannot be carried out.

    The command line prints the message as one line and exits with status 2.
    """


class WorkKeptError(FewbitError):
    """The run was stopped by something outside it. Finished work is kept, and the same command resumes once that is
    fixed.
    """


class ChangedError(FewbitError):
    """A value of a model cannot be written in a foreign format without changing it."""


class CannotImportError(FewbitError):
    """The codes of another tool's checkpoint cannot be written in fewbit's format, though they may be in order."""


class NoTokenizerError(FewbitError):
    """A model's folder has no tokenizer that transformers can read. The model itself may be usable."""


def raised_in(error: BaseException, *packages: str) -> bool:
    """Whether code of one of these packages itself raised an exception, and not something that it called.

    Libraries report what they refuse with general exceptions such as ValueError. The same exception from anywhere else
    is unknown.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] in packages


def missing_extra(package: str, extra: str) -> FewbitError:
    """The error for an optional dependency that is not installed; it names the extra that provides it.

    If the package is installed but its import fails, the error says so. Too little memory is raised unchanged.
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
    """Whether an exception, or one in its chain of causes, says that memory ran out, on any device."""
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
