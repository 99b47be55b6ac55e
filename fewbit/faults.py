"""How the command line reports an exception: one line if the cause is known, otherwise a short bug report."""

import errno
import platform
import traceback
from collections.abc import Sequence
from pathlib import Path

from fewbit.errors import FewbitError, is_out_of_memory
from fewbit.printable import first_line, one_line
from fewbit.versions import versions

_ADVICE = {
    "quantize": "lower --workers, --memory, --samples or --sequence-length",
    "curvature": "lower --memory, --samples or --sequence-length",
    "tune": "pass --checkpointing, or lower --micro-batch or --sequence-length",
    "eval": "lower --seq-len, or pass --dtype bfloat16",
    "study": "pass --size quick, or lower --seq-len, --samples or --sequence-length",
}
_ELSE = "use a smaller model"
_OF_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY),
    *(errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENODEV, errno.EXDEV),
    *(errno.EMFILE, errno.ENFILE),
)
"""What disks and rights refuse, which no program can rule out beforehand."""
_FRAMES = 8
_LONGEST = 600
_HERE = Path(__file__).parent


def line_for(error: BaseException, words: Sequence[str]) -> str | None:
    """The line that says what is wrong and what to do, or None for an exception without a known cause.

    words: those of the command line, for advice that fits the command.
    """
    if isinstance(error, FewbitError):
        return one_line(str(error))
    if is_out_of_memory(error):
        command = next((word for word in words if word in _ADVICE), "")
        advice = _ADVICE.get(command, _ELSE)
        return f"not enough memory ({first_line(error, _LONGEST)}): {advice}, or free some memory on this machine"
    # Libraries raise OSError for much else: only the system's own come with a number and the file that it refused.
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM and (error.filename or error.errno == errno.ENOSPC):
        name = error.filename or "output"
        return one_line(f"{name}: {error.strerror or error}")
    return None


def hidden_error(end: SystemExit) -> Exception | None:
    """The exception that the command line parser mistook for the user's wish to stop, or None."""
    error: BaseException | None = end
    while error is not None:
        if isinstance(error, EOFError):
            return error
        error = error.__cause__ or error.__context__
    return None


def fault_report(error: BaseException) -> str:
    """A bug report of a few lines: the error, where in fewbit it occurred, the call stack, and the versions."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(_HERE)]
    where = _shown(inside[-1]) if inside else "outside of fewbit"
    way = " > ".join(_shown(frame) for frame in frames[-_FRAMES:])
    found = {**versions(), "system": f"{platform.system()} {platform.machine()}"}
    return "\n".join(
        [
            f"fewbit: a bug in fewbit: {type(error).__name__}: {first_line(error, _LONGEST)}",
            f"  where: {where}",
            f"  trace: {way}",
            *(f"  raised from: {type(one).__name__}: {first_line(one, _LONGEST)}" for one in _causes(error)),
            f"  versions: {', '.join(f'{name} {version}' for name, version in found.items())}",
            "  Please report these lines together with the command. No partial output blocks it: you can run it again,",
            "  with the same arguments or with others.",
        ]
    )


def _shown(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    name = path.relative_to(_HERE.parent) if path.is_relative_to(_HERE) else Path(*path.parts[-2:])
    return f"{name.as_posix()}:{frame.lineno} {frame.name}"


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    one = error.__cause__
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__
    return found[:3]
