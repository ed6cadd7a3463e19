"""What can go wrong, said in one line: what, where, and what is allowed.

The command line prints it and exits with 1; what is no ``MlxquantError`` is a bug of ours.
"""


class MlxquantError(Exception):
    """Base of the errors whose message is meant for the user: one line, and harmless to a terminal,
    whatever names a file brings into it."""

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
    """What to tell the user of an error that is not a bug (ours, the system's, or MLX's where
    memory or the device fails: "[operation] …"); None where it may be one."""
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
    """What an error says, to go on from in a line of our own; or what it is, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
