"""What a line that begins with a slash does: one function a command, and a table of them all."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mlxquant.base.errors import BadValue, MlxquantError
from mlxquant.chat import saved, terminal
from mlxquant.chat.session import Session
from mlxquant.runtime.generation import generate
from mlxquant.runtime.sampling import Sampling
from mlxquant.sources import recipes

READ_LIMIT = 4 << 20  # bytes; no context holds more
_BENCH = "Explain in a few sentences why the sky is blue."
_BENCH_TOKENS = 64
_SAMPLING = {f.name: f.default for f in fields(Sampling) if f.name != "logit_bias"}
_NAMES = (*_SAMPLING, "max_tokens", "lookup", "thoughts")


@dataclass(frozen=True)
class Command:
    """``takes`` gives the words to complete with; None stands for paths."""

    usage: str
    help: str
    run: Callable[[Session, str], None]
    takes: Callable[[], list[str]] | None = list

    @property
    def name(self) -> str:
        return self.usage.partition(" ")[0]


def obey(session: Session, line: str) -> None:
    """Run the command in ``line``; raises ``MlxquantError`` with what is wrong."""
    name, _, argument = line.partition(" ")
    command = TABLE.get(name)
    if command is None:
        raise BadValue(f"no command {name}; /help lists them")
    command.run(session, argument.strip())


def _help(session: Session, _: str) -> None:
    width = max(len(command.usage) for command in TABLE.values()) + 2
    for command in TABLE.values():
        session.say(f"{command.usage:{width}}{command.help}")
    session.say('Several lines: begin and end with """, or press Alt-Enter for a new one.\n'
                "Ctrl-R searches what was typed before. Ctrl-C stops a reply and keeps the "
                "conversation.")


def _settings(session: Session) -> dict[str, Any]:
    """Every setting by its name, with its value."""
    talk = session.conversation
    return {**{name: getattr(talk.sampling, name) for name in _SAMPLING},
            "max_tokens": talk.max_tokens, "lookup": talk.loop.lookup, "thoughts": session.thoughts}


def _set(session: Session, argument: str) -> None:
    name, _, text = argument.replace("=", " ").partition(" ")
    text, talk = text.strip(), session.conversation
    if name not in _NAMES or not text:
        raise BadValue(f"/set NAME VALUE, where NAME is one of {', '.join(_NAMES)}")
    if name == "thoughts":
        if text not in ("folded", "shown"):
            raise BadValue(f"thoughts is {text!r}, allowed are folded and shown")
        session.thoughts = text
    elif name == "lookup":
        talk.loop = replace(talk.loop, lookup=_number(name, text))
    elif name == "max_tokens":
        talk.max_tokens = replace(talk, max_tokens=_number(name, text)).max_tokens  # checked
    else:
        talk.sampling = replace(talk.sampling, **{name: _number(name, text)})
    session.say(f"({name} is {_settings(session)[name]})")


def _number(name: str, text: str) -> Any:
    if name == "seed" and text in ("none", "off"):
        return None
    whole = not isinstance(_SAMPLING.get(name), float)
    try:
        return int(text) if whole else float(text)
    except ValueError:
        raise BadValue(f"{name} is {text!r}, allowed is a {'whole ' * whole}number") from None


def _show(session: Session, argument: str) -> None:
    talk = session.conversation
    if argument == "thoughts":
        session.say(talk.thoughts.strip() or "(no reasoning before the last reply)")
        return
    if argument:
        raise BadValue("/show has no argument, or: thoughts")
    session.say(f"model {talk.model.name} in {talk.model.folder}")
    session.say(f"system {talk.system or '(none)'}")
    session.say(" · ".join(f"{name} {value}" for name, value in _settings(session).items()))
    session.say(f"{len(talk.messages) // 2} turns, {talk.forgotten // 2} forgotten, "
                f"context {talk.used()}")


def _system(session: Session, text: str) -> None:
    if not text:
        session.say(session.conversation.system or "(no system prompt)")
        return
    if text == "none":  # which takes away what a template may refuse
        session.conversation.system = None
        session.say("(no system prompt from here on)")
        return
    session.conversation.system = text
    session.conversation.clear()
    session.say("(system prompt set, conversation cleared)")


def _clear(session: Session, _: str) -> None:
    session.conversation.clear()
    session.attached = []
    session.say("(conversation cleared)")


def _ask_again(session: Session, text: str) -> None:
    """Answer the last message, with ``text`` in place of its own, once more; keep the last exchange
    on an error."""
    talk, (files, said) = session.conversation, session.last_sent()
    messages, forgotten = talk.messages, talk.forgotten
    talk.undo()
    try:
        session.send(text or said, files)
    except BaseException:
        if len(talk.messages) < len(messages):
            talk.messages, talk.forgotten = messages, forgotten
        raise


def _undo(session: Session, _: str) -> None:
    files, said = session.last_sent()
    session.conversation.undo()
    session.attached = [*files, *session.attached]
    session.say(f"(taken back: {' '.join(said.split())[:60]})")
    session.remind()


def _edit(session: Session, text: str) -> None:
    if text:
        _ask_again(session, text)
    elif not terminal.has_editor():
        raise BadValue("/edit needs a text where nobody types")
    else:
        session.prefilled = f"/edit {session.last_sent()[1]}"  # the next prompt begins with it


def _save(session: Session, argument: str) -> None:
    files = saved.save(session.conversation, _path("/save", argument))
    size = sum(file.stat().st_size for file in files)
    session.say(f"(saved: {' and '.join(map(str, files))}, {size / 1e6:.1f} MB)")


def _load(session: Session, argument: str) -> None:
    talk = session.conversation
    model = saved.load(_path("/load", argument), talk)
    kept = f"{len(talk.cache.tokens)} tokens need no processing" if talk.cache.tokens else (
        f"its keys and values are not there, or not of this model ({model}) and these options: "
        "computed again when needed")
    session.say(f"({len(talk.messages) // 2} turns; {kept})")


def _read(session: Session, argument: str) -> None:
    if not argument:
        session.attached = []
        session.say("(no file goes with the next message)")
        return
    path = _path("/read", argument)
    try:
        size = path.stat().st_size
        if size > READ_LIMIT:
            raise BadValue(f"{path} has {size / 1e6:.0f} MB, allowed are {READ_LIMIT >> 20}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MlxquantError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MlxquantError(f"{path} is not text in UTF-8") from error
    session.attached.append(f"{path.name}:\n```\n{text.rstrip()}\n```\n")
    session.say(f"({path.name}, {len(text.splitlines())} lines, goes with the next message)")


def _path(command: str, argument: str) -> Path:
    try:
        path = Path(argument).expanduser()
    except RuntimeError as error:  # no such user's home
        raise BadValue(f"{argument}: {error}") from error
    if path.name in ("", "..") or "\0" in argument:
        raise BadValue(f"{command} needs a file's name")
    return path


def _stats(session: Session, _: str) -> None:
    talk = session.conversation
    session.say(talk.last_report.line() if talk.last_report else "no reply yet")
    session.say(f"{talk.used()} tokens of context in use")


def _bench(session: Session, _: str) -> None:
    talk = session.conversation
    talk.require_model()
    report = generate(talk.model, [{"role": "user", "content": _BENCH}],
                      max_tokens=_BENCH_TOKENS, kv_bits=talk.loop.kv_bits).report
    session.say(report.line())


def _model(session: Session, name: str) -> None:
    if not name:
        session.say(session.conversation.model.name)
        return
    session.change_model(name)
    session.say(f"(now {session.conversation.model.name}; the conversation goes on)")


def _exit(session: Session, _: str) -> None:
    session.over = True


def _models() -> list[str]:
    folders = (f"{path}/" for path in Path().iterdir() if (path / "config.json").is_file())
    return [*recipes.names(), *folders, *(path.name for path in Path().glob("*.gguf"))]


TABLE = {command.name: command for command in (
    Command("/help", "this list", _help),
    Command("/set NAME VALUE", "temperature, top_p, seed, max_tokens, thoughts …",
            _set, lambda: list(_NAMES)),
    Command("/show [thoughts]", "settings, or the reasoning before the last reply", _show,
            lambda: ["thoughts"]),
    Command("/system [TEXT]", "set the system prompt and start over; none: go on without; "
            "alone: show it", _system, lambda: ["none"]),
    Command("/clear", "forget the conversation, keep the system prompt", _clear),
    Command("/retry", "answer the last message again", lambda session, _: _ask_again(session, "")),
    Command("/undo", "take the last exchange back", _undo),
    Command("/edit [TEXT]", "change the last message and ask again", _edit),
    Command("/save FILE", "keep the conversation, with its keys and values", _save, None),
    Command("/load FILE", "go on with one", _load, None),
    Command("/read [FILE]", "send a text file with the next message; alone: none", _read, None),
    Command("/stats", "speed of the last reply, and how full the context is", _stats),
    Command("/bench", "speed of a short fixed reply", _bench),
    Command("/model [NAME]", "go on with another model", _model, _models),
    Command("/exit", "leave (also Ctrl-D)", _exit),
)}
