"""Text from outside: what a terminal may be shown, and what is not text at all."""

import re

from mlxquant.base.errors import MlxquantError

# Control characters except new line and tab (C0, DEL, C1), characters that reorder text, and
# U+2028 and U+2029, which some programs take for the end of a line.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f"
                     "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """``text`` without characters that control a terminal or change the direction of text.

    Only these characters are dropped, not the rest of an escape sequence, so that a stream may be
    cleaned in pieces, wherever it is cut.
    """
    return _UNSAFE.sub("", text)


def require_unicode(text: str, what: str) -> str:
    """``text``; raises ``MlxquantError`` where it holds bytes that could not be decoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise MlxquantError(f"{what} is not text in UTF-8 (line {line})") from error
    return text
