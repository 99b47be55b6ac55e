"""Foreign words in our messages."""


def shown(words: object, longest: int = 300) -> str:
    """Words from a file in one line, with nothing in them that a terminal would act upon."""
    line = "".join(c if c.isprintable() else "�" for c in " ".join(str(words).split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])
