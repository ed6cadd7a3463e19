"""A Hugging Face tokenizer from GGUF metadata alone: vocabulary, merges, special tokens, template."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mlxquant.errors import BadCheckpoint, Unsupported
from mlxquant.gguf.reader import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_SPLITTERS = {
    "default": _BYTES,
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
}


def files(file: GGUFFile) -> dict[str, str]:
    """``tokenizer.json`` and ``tokenizer_config.json`` as text, by file name.

    Raises ``Unsupported`` for a tokenizer or a splitting rule that is not known
    by name: a guess would tokenise wrongly without a sign.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    if fields.get("model") != "gpt2":
        raise Unsupported(f"{file.path}: tokenizer {fields.get('model')!r}; supported: 'gpt2'")
    splitter = fields.get("pre", "default")
    if splitter not in _SPLITTERS:
        raise Unsupported(f"{file.path}: tokenizer splitting rule {splitter!r}; "
                          f"supported: {', '.join(_SPLITTERS)}")
    try:
        tokens = _list(fields, "tokens", str)
        merges = [tuple(m.split(" ")) for m in _list({"merges": []} | fields, "merges", str)]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except BadCheckpoint:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise BadCheckpoint(f"{file.path}: tokenizer metadata is inconsistent: {error}") from error
    tokenizer.pre_tokenizer = _SPLITTERS[splitter]
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("token_type") or [0] * len(tokens)
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED))
    roles = {role: _token(file, tokens, fields.get(f"{key}_token_id")) for role, key in
             {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()}
    if fields.get("add_bos_token") and roles["bos"]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{roles['bos']} $A", special_tokens=[(roles["bos"], fields["bos_token_id"])])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.metadata.get("llama.context_length"),
        **{f"{role}_token": token for role, token in roles.items() if token},
    }
    if template := file.metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {"tokenizer.json": tokenizer.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}


def _list(fields: dict, key: str, kind: type) -> list:
    values = fields.get(key)
    if not isinstance(values, list) or not all(isinstance(v, kind) for v in values):
        raise BadCheckpoint(f"GGUF metadata lacks the list tokenizer.ggml.{key}")
    return values


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, type_ in zip(tokens, types) if type_ == kind]


def _token(file: GGUFFile, tokens: list[str], number: int | None) -> str | None:
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise BadCheckpoint(f"{file.path}: special token {number} is outside the vocabulary "
                            f"of {len(tokens)}")
    return tokens[number]
