"""Text from files and libraries in our messages."""


def shown(words: object, longest: int = 300) -> str:
    """Text from a file in one line, without control characters that would affect a terminal."""
    line = "".join(c if c.isprintable() else "�" for c in " ".join(str(words).split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])
