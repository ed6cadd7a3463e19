r"""How byte-level BPE splits text before merging, by GGUF's ``tokenizer.ggml.pre``.

The expressions are those of the models' own tokenizer.json files, as the comments of llama.cpp's
``llama-vocab.cpp`` quote them, in as many steps as that file takes. A kind that is not listed is
refused: a guess would tokenise wrongly without a sign.
"""

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}"
_GPT4O = rf"{_CASED % ((_CONTRACTION + '?',) * 2)}|\p{{N}}{{1,3}}|{_CASED_REST}"
_DEEPSEEK3 = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
              r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
              r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
              r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Splitter:
    """Expressions applied in turn, each to the pieces that the last one left.

    ``whole_words``: words of the vocabulary are taken before merging. ``begins``: texts begin with
    BOS where the file does not say. ``composed``: text is brought into Unicode's form NFC first.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    composed: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in self.expressions]
        octets = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, octets])


_KINDS = {
    Splitter((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): "default",
    Splitter((_GPT2,)): "gpt-2 phi-2 mpt olmo jais trillion exaone4 mellum modern-bert a.x-4.0 "
                        "gigachat",
    Splitter((r"\p{N}", _GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    Splitter((_LLAMA3,), whole_words=True, begins=True): "llama-bpe llama3 llama-v3 falcon3 lfm2",
    Splitter((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe glm4",
    Splitter((_QWEN2,), composed=True): "qwen2",
    Splitter((_QWEN2,)): "deepseek-r1-qwen stablelm2 megrez hunyuan grok-2",
    Splitter((_TEKKEN,), whole_words=True, begins=True): "tekken",
    Splitter((_GPT4O,)): "gpt-4o llama4",
    Splitter(_DEEPSEEK3): "deepseek-v3 hunyuan-dense",
    Splitter((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+",)): "seed-coder",
}
SPLITTERS = {name: splitter for splitter, names in _KINDS.items() for name in names.split()}
