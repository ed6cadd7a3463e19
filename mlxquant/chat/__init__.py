"""A conversation in a terminal, or through a pipe."""

from mlxquant.chat.conversation import Conversation
from mlxquant.chat.session import Session, run

__all__ = ["Conversation", "Session", "run"]
