"""A conversation on disk: a JSON file of what was said, and its keys and values beside it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxquant.base.errors import BadCheckpoint, MlxquantError
from mlxquant.base.storage import write_json
from mlxquant.chat.conversation import Conversation
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.sampling import Sampling
from mlxquant.sources import checkpoint

FORMAT = 1
_KEYS = {"format", "model", "weights", "system", "sampling", "max_tokens", "messages", "forgotten"}


@dataclass(frozen=True)
class Saved:
    """What a file holds; ``cache`` is None where none fits the model."""

    model: str
    system: str | None
    sampling: Sampling
    max_tokens: int
    messages: list[dict[str, Any]]
    forgotten: int
    cache: PromptCache | None

    def into(self, conversation: Conversation) -> None:
        """Continue here."""
        conversation.system, conversation.sampling = self.system, self.sampling
        conversation.max_tokens, conversation.messages = self.max_tokens, self.messages
        conversation.forgotten, conversation.thoughts = self.forgotten, ""
        conversation.cache = self.cache or PromptCache()


def save(conversation: Conversation, path: Path) -> list[Path]:
    """Write a conversation; returns the files made, each in one step. Sizes grow with the context."""
    path = _with_ending(path)
    write_json(path, {
        "format": FORMAT, "model": conversation.model.name, "weights": _weights(conversation.model),
        "system": conversation.system, "sampling": asdict(conversation.sampling),
        "max_tokens": conversation.max_tokens, "messages": conversation.messages,
        "forgotten": conversation.forgotten})
    beside = path.with_suffix(".safetensors")
    if not conversation.cache.tokens:
        beside.unlink(missing_ok=True)  # those of an earlier conversation
        return [path]
    conversation.cache.save(beside)
    return [path, beside]


def load(path: Path, model: LanguageModel) -> Saved:
    """Read a conversation to go on with ``model``.

    Keys and values are taken only if they are there and were computed with the same
    weights. Raises ``MlxquantError`` or ``BadCheckpoint``.
    """
    path = _with_ending(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MlxquantError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadCheckpoint(f"{path} is no saved conversation: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.keys() != _KEYS:
        raise BadCheckpoint(f"{path} is no saved conversation of format {FORMAT}")
    if not _are_messages(value["messages"]):
        raise BadCheckpoint(f"{path}: messages must be pairs of user and assistant with their content")
    if not (type(value["max_tokens"]) is int and value["max_tokens"] > 0
            and value["forgotten"] in range(0, len(value["messages"]) + 1, 2)):
        raise BadCheckpoint(f"{path}: max_tokens and forgotten must be whole numbers that fit the messages")
    beside = path.with_suffix(".safetensors")
    fits = value["weights"] == _weights(model) and beside.is_file()
    try:
        sampling = Sampling(**value["sampling"])
    except TypeError as error:
        raise BadCheckpoint(f"{path}: sampling has other settings than this version: {error}") from error
    return Saved(value["model"], value["system"], sampling, value["max_tokens"], value["messages"],
                 value["forgotten"], PromptCache.load(beside) if fits else None)


def _with_ending(path: Path) -> Path:
    return path.expanduser() if path.suffix == ".json" else path.expanduser().with_name(f"{path.name}.json")


def _weights(model: LanguageModel) -> str:
    """What tells keys and values of one model from those of another: its files' names and sizes,
    and how they run here."""
    files = sorted((f.name, f.stat().st_size) for f in checkpoint.weight_files(model.folder))
    return f"{files} {mx.default_device()} {model.weight_bytes_per_token}"


def _are_messages(messages: Any) -> bool:
    return isinstance(messages, list) and len(messages) % 2 == 0 and all(
        isinstance(m, dict) and m.get("role") == role and isinstance(m.get("content"), str)
        for m, role in zip(messages, ("user", "assistant") * (len(messages) // 2)))
