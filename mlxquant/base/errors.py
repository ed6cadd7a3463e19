"""Errors whose one-line message tells the user what is wrong, where, and what is allowed.

The command line prints the message and exits with 1. Other exceptions are bugs of this package,
except those for which ``one_line`` has a message.
"""


class MlxquantError(Exception):
    """Base of the errors whose message is meant for the user. Characters that are not printable,
    for example in a name that a file supplies, are escaped, so that the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class ModelNotFound(MlxquantError):
    """A name that is no folder, file, recipe or reachable repository."""


class BadCheckpoint(MlxquantError):
    """A model file that is truncated, inconsistent or incomplete."""


class Unsupported(MlxquantError):
    """A well-formed file that asks for something this version cannot do."""


class TooLarge(MlxquantError):
    """A model, prompt or file that does not fit where it must."""


class BadValue(MlxquantError):
    """An argument outside its allowed range."""


class CannotWrite(MlxquantError):
    """A disk that is full, a folder that is read-only, a path that something else takes."""


def one_line(error: BaseException) -> str | None:
    """The message for the user where an error is not a bug: an ``MlxquantError``, an ``OSError``,
    lack of memory, or MLX's "[operation] …" of a failed device; None where it may be a bug."""
    if isinstance(error, MlxquantError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, OSError) or (type(error) is RuntimeError and str(error).startswith("[")):
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; its type if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
