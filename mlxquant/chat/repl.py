"""The loop: read a message or a command, answer or obey it, and let no error end the chat."""

from mlxquant.base.errors import MlxquantError, one_line
from mlxquant.base.storage import state_dir
from mlxquant.base.text import require_unicode
from mlxquant.chat import commands, saved, terminal
from mlxquant.chat.session import Session
from mlxquant.runtime.prompt_cache import PromptCache


def run(session: Session) -> None:
    """Talk until Ctrl-D, ``/exit`` or the end of the pipe."""
    takes = {name: command.takes for name, command in commands.TABLE.items()}
    reader = terminal.reader(takes, session.status)
    with terminal.quiet() as typed:
        while not session.over:
            session.prefilled += typed()
            try:
                text = read(session, reader)
            except KeyboardInterrupt:
                session.say("(Ctrl-D or /exit leaves)")
            except EOFError:
                return
            else:
                _survive(session, text)


def read(session: Session, reader: terminal.Read) -> str:
    """The next message, or a command, in one piece."""
    start, session.prefilled = session.prefilled, ""
    return terminal.unquoted(reader(start))


def handle(session: Session, text: str) -> None:
    """Answer one message or obey one command; what goes wrong is said in one line.

    Raises what may be a bug while answering, and ``BrokenPipeError`` where nobody reads.
    """
    is_command = text.startswith("/edit ") or (text.startswith("/") and "\n" not in text)
    try:
        require_unicode(text, "the message")
        if is_command:
            commands.obey(session, text)
        elif text:
            session.send(text)
    except KeyboardInterrupt:
        session.say("(stopped)")
    except MlxquantError as error:
        session.say(f"error: {error}")
    except BrokenPipeError:
        raise
    except Exception as error:
        session.conversation.cache = PromptCache()  # what it holds is not known
        line = one_line(error)
        if line is None and not is_command:
            raise
        session.say(f"error: {line or f'{type(error).__name__}: {error}'}")


def _survive(session: Session, text: str) -> None:
    """Handle ``text``; a bug, of ours or MLX's, must not take the conversation with it."""
    try:
        handle(session, text)
    except Exception:
        try:
            kept = saved.save(session.conversation, state_dir("kept"))
            session.say(f"(the conversation is kept: /load {kept[0]})")
        except Exception as error:
            session.say(f"(the conversation cannot be kept: {error})")
        raise
