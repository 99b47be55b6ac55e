"""A program in a pseudo-terminal, driven as by someone who types."""

import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from types import TracebackType


class Terminal:
    """A program with a terminal of its own. POSIX only."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        import pty

        self._process, self._file = pty.fork()
        if self._process == 0:
            # What a shell starts in the background ignores interrupts, and so would this program.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvpe(words[0], list(words), dict(environment))
        self.seen = ""
        """All that was shown so far."""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
        if error is not None:
            os.kill(self._process, 9)
            os.waitpid(self._process, 0)

    def type(self, text: str) -> None:
        """Send keys; control characters do what they do in a terminal."""
        os.write(self._file, text.encode())

    def wait_for(self, wanted: str, start: int = 0, seconds: float = 120) -> int:
        """Wait until a text is shown behind `start`; returns where it ends."""
        until = time.monotonic() + seconds
        while (at := self.seen.find(wanted, start)) < 0:
            if time.monotonic() > until or not self._read(1.0, until):
                raise AssertionError(f"{wanted!r} was not shown: {self.seen[start:]!r}")
        return at + len(wanted)

    def press(self, key: str, wanted: str, start: int, times: int = 24) -> int:
        """Send a key until a text is shown behind `start`; returns where it ends.

        Python's `input` misses an interrupt that comes when the prompt is shown and it does not wait for keys yet.
        """
        for _ in range(times):
            self.type(key)
            try:
                return self.wait_for(wanted, start, 5)
            except AssertionError:
                continue
        raise AssertionError(f"{wanted!r} was not shown: {self.seen[start:]!r}")

    def wait_for_more(self, count: int, seconds: float = 120) -> None:
        """Wait until `count` more characters are shown."""
        until, size = time.monotonic() + seconds, len(self.seen) + count
        while len(self.seen) < size:
            if not self._read(1.0, until):
                raise AssertionError(f"nothing more was shown: {self.seen!r}")

    def end(self, seconds: float = 120) -> int:
        """Wait until the program has ended; returns its exit status."""
        until = time.monotonic() + seconds
        while self._read(1.0, until):
            pass
        _, status = os.waitpid(self._process, 0)
        return os.waitstatus_to_exitcode(status)

    def _read(self, wait: float, until: float) -> bool:
        """Read what is shown; False at the end, or after the time is over."""
        ready, _, _ = select.select([self._file], [], [], wait)
        if not ready:
            return time.monotonic() < until
        try:
            found = os.read(self._file, 65536)
        except OSError:
            # Linux reports so that the program has closed its side.
            return False
        self.seen += found.decode(errors="replace")
        return bool(found)
