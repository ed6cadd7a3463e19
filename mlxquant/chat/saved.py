"""A conversation on disk: a JSON file of what was said, and its keys and values beside it."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxquant.base.errors import BadCheckpoint, MlxquantError
from mlxquant.base.storage import disk_errors, write_json
from mlxquant.base.version import __version__
from mlxquant.chat.conversation import Conversation
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.sampling import Sampling

FORMAT = 1
_KEYS = {"format", "model", "weights", "system", "sampling", "max_tokens", "messages", "forgotten"}


def save(conversation: Conversation, path: Path) -> list[Path]:
    """Write a conversation, each file in one step, and return the files; keys and values are
    large. Raises ``MlxquantError`` where they cannot be written, or would take the place of a file
    that is no saved conversation's."""
    path = _with_ending(path)
    beside = path.with_suffix(".safetensors")
    _require_own(path, beside)
    write_json(path, {
        "format": FORMAT, "model": conversation.model.name,
        "weights": _fingerprint(conversation.model), "system": conversation.system,
        "sampling": asdict(conversation.sampling), "max_tokens": conversation.max_tokens,
        "messages": conversation.messages, "forgotten": conversation.forgotten})
    if (kept := conversation.kept()).tokens:
        kept.save(beside)
        return [path, beside]
    with disk_errors(beside):
        beside.unlink(missing_ok=True)  # those of an earlier conversation
    return [path]


def load(path: Path, conversation: Conversation) -> str:
    """Go on with a saved conversation; returns the name of the model that it was held with.

    Keys and values are taken only if they are there, were computed by the same model and are held
    as the conversation's loop holds them: of a draft model none are saved.
    Raises ``MlxquantError``, ``BadCheckpoint`` or ``BadValue``, and then changes nothing.
    """
    path = _with_ending(path)
    value = _read(path)
    try:
        sampling = Sampling(**value["sampling"])
    except TypeError as error:
        raise BadCheckpoint(
            f"{path}: sampling has other settings than this version: {error}") from error
    beside, loop = path.with_suffix(".safetensors"), conversation.loop
    fits = (beside.is_file() and loop.draft is None
            and value["weights"] == _fingerprint(conversation.model))
    cache = PromptCache.load(beside) if fits else PromptCache()
    conversation.cache = cache if cache.bits <= {loop.kv_bits} else PromptCache()
    conversation.sampling, conversation.thoughts = sampling, ""
    for name in ("system", "max_tokens", "messages", "forgotten"):
        setattr(conversation, name, value[name])
    return str(value["model"])


def _require_own(path: Path, beside: Path) -> None:
    """Raise ``BadCheckpoint`` where one of the files is there and of another kind."""
    try:
        if path.is_file():
            _read(path)
        if beside.is_file():
            PromptCache.load(beside)  # only the header: MLX reads arrays when they are used
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{error}; give another name") from error


def _read(path: Path) -> dict[str, Any]:
    """The content of the JSON file, of the right form."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MlxquantError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is no saved conversation: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.keys() != _KEYS:
        raise BadCheckpoint(f"{path} is no saved conversation of format {FORMAT}")
    if not isinstance(value["model"], str) or not isinstance(value["system"], str | None):
        raise BadCheckpoint(f"{path}: model and system must be text")
    if not _are_messages(value["messages"]):
        raise BadCheckpoint(
            f"{path}: messages must be pairs of user and assistant with their content")
    if not (type(value["max_tokens"]) is int and value["max_tokens"] > 0
            and value["forgotten"] in range(0, len(value["messages"]) + 1, 2)):
        raise BadCheckpoint(
            f"{path}: max_tokens and forgotten must be whole numbers that fit the messages")
    return value


def _with_ending(path: Path) -> Path:
    path = path.expanduser()
    return path if path.suffix == ".json" else path.with_name(f"{path.name}.json")


def _fingerprint(model: LanguageModel) -> str:
    """A digest of what keys and values depend on: every weight, the configuration, this program.

    The weights are read once, as for one token; each counts by its name and the sum of its bytes.
    Without a network it is empty: no keys and values are saved then.
    """
    if model.network is None:
        return ""
    sums = {name: array.view(mx.uint8).sum() if array.size else mx.array(0)
            for name, array in tree_flatten(model.network.parameters(), destination={}).items()}
    mx.eval(sums)
    held = {name: value.item() for name, value in sums.items()}
    config = json.dumps(model.config, sort_keys=True, default=str)
    return hashlib.sha256(
        repr((held, config, __version__, mx.default_device())).encode()).hexdigest()


def _are_messages(messages: Any) -> bool:
    return isinstance(messages, list) and len(messages) % 2 == 0 and all(
        isinstance(m, dict) and m.get("role") == role and isinstance(m.get("content"), str)
        for m, role in zip(messages, ("user", "assistant") * (len(messages) // 2)))
