"""A conversation in a terminal, or through a pipe."""

from mlxquant.chat.conversation import Conversation
from mlxquant.chat.repl import run
from mlxquant.chat.session import Session

__all__ = ["Conversation", "Session", "run"]
