"""A Hugging Face tokenizer from GGUF metadata: vocabulary, merges, special tokens, template."""

import json
import sys
from typing import Any, NoReturn

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from mlxquant.base.errors import BadCheckpoint, MlxquantError, Unsupported, first_line
from mlxquant.sources.gguf.reader import GGUFModel
from mlxquant.sources.gguf.splitters import SPLITTERS

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # llama.cpp's token types
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
_LONGEST = 1024  # characters of a token; its splits are tried one by one
_Roles = dict[str, str | None]


def files(file: GGUFModel) -> dict[str, str]:
    """``tokenizer.json`` and ``tokenizer_config.json`` as text, by file name. Raises
    ``Unsupported`` for a kind of tokenizer or splitting rule that is not known by name,
    ``BadCheckpoint`` for metadata that contradict themselves."""
    fields = _Fields(file)
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece}
    kind = fields.get("model")
    if not isinstance(kind, str) or kind not in kinds:
        raise Unsupported(f"{file.path}: tokenizer {kind!r}; supported: {', '.join(kinds)}")
    try:
        tokenizer, roles, begins = kinds[kind](fields)
        for type_, add in ((_CONTROL, tokenizer.add_special_tokens),
                           (_USER_DEFINED, tokenizer.add_tokens)):
            add([AddedToken(fields.tokens[index], normalized=False, special=type_ == _CONTROL)
                 for index in np.flatnonzero(fields.types == type_)])
        _frame(tokenizer, fields, roles, begins)
        text = tokenizer.to_str(pretty=True)
    except MlxquantError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        fields.refuse(first_line(error))
    context = f"{file.metadata['general.architecture']}.context_length"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.metadata.get(context),
        **{f"{role}_token": token for role, token in roles.items() if token},
    }
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return {"tokenizer.json": text,
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}


def stops(file: GGUFModel) -> dict[str, Any]:
    """``bos_token_id`` and ``eos_token_id`` for config.json: all tokens that end a reply."""
    fields = _Fields(file)
    ends = [n for role in ("eos", "eot", "eom") if (n := fields.number(role)) is not None]
    control = np.flatnonzero(fields.types == _CONTROL)
    ends += [int(n) for n in control if fields.tokens[n] in _TURN_ENDS]
    ends = list(dict.fromkeys(ends))
    entries = {"bos_token_id": fields.number("bos"),
               "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    return {key: value for key, value in entries.items() if value is not None}


class _Fields:
    """The metadata of a tokenizer, checked as they are asked for."""

    def __init__(self, file: GGUFModel) -> None:
        self.path, self._metadata = file.path, file.metadata
        tokens = self.strings("tokens")
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
        self.vocabulary = {token: number for number, token in enumerate(self.tokens)}
        if len(self.vocabulary) < len(self.tokens):
            self.refuse("a token is there twice")
        if max(map(len, self.tokens)) > _LONGEST:
            self.refuse(f"a token has more than {_LONGEST} characters")
        self.types = (np.zeros(len(tokens), np.int32) if self.get("token_type") is None else
                      self.numbers("token_type"))

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def refuse(self, reason: str) -> NoReturn:
        raise BadCheckpoint(f"{self.path}: tokenizer metadata is inconsistent: {reason}")

    def strings(self, key: str) -> list[str]:
        values = self.get(key)
        if not isinstance(values, list) or {type(value) for value in values} != {str}:
            self.refuse(f"tokenizer.ggml.{key} is no list of strings")
        return values

    def numbers(self, key: str) -> np.ndarray:
        """One number for each token."""
        values = self.get(key)
        if not isinstance(values, np.ndarray) or len(values) != len(self.tokens):
            self.refuse(f"tokenizer.ggml.{key} has no number for each of {len(self.tokens)} tokens")
        return values

    def number(self, role: str, default: int | None = None) -> int | None:
        """The number of a special token."""
        value = self.get(f"{role}_token_id", default)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            self.refuse(f"{role}_token_id {value!r} is outside the vocabulary of "
                        f"{len(self.tokens)}")
        return value

    def roles(self, defaults: dict[str, int]) -> _Roles:
        """The special tokens by what they are for."""
        numbers = {role: self.number(key, defaults.get(role)) for role, key in _ROLES.items()}
        return {role: None if number is None else self.tokens[number]
                for role, number in numbers.items()}


def _byte_level(fields: _Fields) -> tuple[Tokenizer, _Roles, bool]:
    """BPE over bytes, as GPT-2's."""
    kind = fields.get("pre")
    if kind is None:
        print(f"{fields.path} does not say how its tokenizer splits text (tokenizer.ggml.pre): "
              "llama.cpp's default is taken, which the model may not have been trained with",
              file=sys.stderr)
        kind = "default"
    if not isinstance(kind, str) or kind not in SPLITTERS:
        raise Unsupported(f"{fields.path}: tokenizer splitting rule {kind!r}; "
                          f"supported: {', '.join(SPLITTERS)}")
    splitter = SPLITTERS[kind]
    merges: list[Any] = []
    if len(fields.get("merges", ())):
        merges = [tuple(merge.split(" ")) for merge in fields.strings("merges")]
    tokenizer = Tokenizer(models.BPE(fields.vocabulary, merges,
                                     ignore_merges=splitter.whole_words))
    if splitter.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, fields.roles({}), splitter.begins


def _sentence_piece(fields: _Fields) -> tuple[Tokenizer, _Roles, bool]:
    """SentencePiece's BPE: a piece's score ranks the merges that make it; unknown characters fall
    back to bytes."""
    scores, roles = fields.numbers("scores"), fields.roles({"bos": 1, "eos": 2, "unk": 0})
    mergeable = {token: n for token, n in fields.vocabulary.items()
                 if fields.types[n] not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)}
    merges = []
    for token in sorted(mergeable, key=lambda t: (-scores[mergeable[t]], mergeable[t])):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += sorted(((a, b) for a, b in splits if a in mergeable and b in mergeable),
                         key=lambda pair: (mergeable[pair[0]], mergeable[pair[1]]))
    tokenizer = Tokenizer(models.BPE(
        fields.vocabulary, merges, unk_token=roles["unk"], fuse_unk=True,
        byte_fallback=bool((fields.types == _BYTE).any())))
    prefixed = fields.get("add_space_prefix", True)
    begin = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    end = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return tokenizer, roles, True


def _frame(tokenizer: Tokenizer, fields: _Fields, roles: _Roles, begins: bool) -> None:
    """Begin and end texts with BOS and EOS where the file, or else its kind, says so."""
    begin = roles["bos"] if fields.get("add_bos_token", begins) else None
    end = roles["eos"] if fields.get("add_eos_token", False) else None
    around = [token for token in (begin, end) if token]
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[part for part in (begin, "$A", end) if part],
            special_tokens=[(token, fields.vocabulary[token]) for token in dict.fromkeys(around)])
