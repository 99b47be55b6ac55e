"""The one exception that users see: a line that says what is wrong, where, and what to do."""


class FewbitError(Exception):
    """Bad input or an environment that cannot do what was asked.

    The command line prints the message as one line and exits with status 2.
    """


def missing_extra(package: str, extra: str) -> FewbitError:
    """The error for an optional dependency that is not installed, naming the extra that brings it."""
    return FewbitError(f"this needs the package {package}: install it with  pip install 'fewbit[{extra}]'")
