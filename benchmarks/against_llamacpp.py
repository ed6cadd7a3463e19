"""Whether an imported file means to us what it means to llama.cpp: its predictions, and its tokens.

    pip install xllamacpp; python benchmarks/against_llamacpp.py TEXT

The random models of ``tests/test_gguf_architectures.py`` are written as GGUF files, imported, and
run on eight tokens by mlx-lm (float32) and by llama.cpp (its CPU back end, keys and values in
float16); the log probabilities of the 50 likeliest tokens are compared. Tokenizers: byte-level BPE
with merges that cross words, so that it shows where text is split, under every splitting rule that
we know, and a SentencePiece model, both trained on TEXT.
"""

import io
import json
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import mlxquant

# isort: split
import mlx.core as mx
import numpy as np
import sentencepiece
import xllamacpp
from conftest import SPECIAL, alphabet
from gguf import GGUFWriter
from gguf_files import write_gguf
from record import Row, parser, save
from test_gguf_architectures import CASES, frequency_factors, random_model
from test_gguf_tokenizer import SAMPLE, TEXTS, piece_fields
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlxquant.sources.gguf import import_file
from mlxquant.sources.gguf.splitters import SPLITTERS

Write = Callable[[GGUFWriter], None]  # a tokenizer into a file
ALPHABET = [*alphabet()[:-1], "ab"]  # llama.cpp wants a merge
TOKENS = [5, 80, 200, 7, 99, 41, 300, 6]
SCALINGS = {
    "linear": ({"type": "linear", "factor": 4.0},
               {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
             {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
              "rope.scaling.original_context_length": 128}),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, {}),
}


def server(path: Path) -> xllamacpp.Server:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 64, 1, 0
    parameters.warmup = False
    return xllamacpp.Server(parameters)


def predictions(running: xllamacpp.Server) -> dict[int, float]:
    """Log probabilities of the likeliest next tokens, by token."""
    answer = running.handle_completions({"prompt": TOKENS, "n_predict": 1, "n_probs": 50,
                                         "temperature": -1.0})
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in likeliest}


def tokenised(running: xllamacpp.Server, text: str) -> list[int]:
    content = json.dumps({"content": text, "add_special": True, "parse_special": True})
    request = urllib.request.Request(f"{running.listening_address}/tokenize", content.encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def compare_predictions(folder: Path, name: str, architecture: str, changes: Row, fields: Row,
                        extra: Sequence[tuple[str, np.ndarray]] = ()) -> Row:
    network, config = random_model(architecture, changes)
    path = write_gguf(folder / "m.gguf", network, config=config, architecture=architecture,
                      fields=fields, extra=extra,
                      tokens=bytes_tokenizer("gpt-2", ALPHABET, ["a b"]))
    import_file(path, folder / name)
    logits = mlxquant.load(str(folder / name)).network(mx.array([TOKENS]))[0, -1].astype(mx.float32)
    ours = np.array(logits - mx.logsumexp(logits))
    theirs = predictions(server(path))
    gap = max(abs(float(ours[token]) - value) for token, value in theirs.items())
    spread = max(theirs.values()) - min(theirs.values())
    print(f"{name}: log probabilities differ by at most {gap:.4f} (from the first to the 50th: "
          f"{spread:.2f})", flush=True)
    return {"model": name, "largest_difference": gap, "spread": spread}


def bytes_tokenizer(pre: str, tokens: list[str], merges: list[str]) -> Write:
    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(2)

    return write


def pieces_tokenizer(fields: Row) -> Write:
    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(fields["tokens"])
        writer.add_token_scores(fields["scores"].tolist())
        writer.add_token_types(fields["token_type"].tolist())
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(fields["add_space_prefix"])

    return write


def across_words(text: str) -> tuple[list[str], list[str]]:
    """Tokens and merges of a BPE that was trained on whole lines."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n\n", "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIAL, max_token_length=16,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(trained.to_str())["model"]
    return list(model["vocab"]), [" ".join(pair) for pair in model["merges"]]


def compare_tokens(folder: Path, name: str, write: Write, size: int, texts: list[str]) -> Row:
    network, config = random_model("llama", {"vocab_size": size})
    path = write_gguf(folder / "t.gguf", network, config=config, tokens=write)
    import_file(path, folder / f"tokens-{name}")
    ours, running = mlxquant.load(str(folder / f"tokens-{name}")).tokenizer, server(path)
    different = [text for text in texts if list(ours.encode(text)) != tokenised(running, text)]
    print(f"tokenizer {name}: {len(texts) - len(different)} of {len(texts)} texts alike",
          flush=True)
    return {"kind": name, "texts": len(texts), "different": len(different),
            "first_different": different[:2]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("text", type=Path)
    text = options.parse_args().text.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    texts = [t for t in (*TEXTS, SAMPLE, *lines[:150], Path(__file__).read_text()[:3000]) if t]
    with tempfile.TemporaryDirectory(prefix="mlxquant-llamacpp-") as scratch:
        folder = Path(scratch)
        rows = [compare_predictions(folder, name, name, *case) for name, case in CASES.items()]
        for name, (scaling, fields) in SCALINGS.items():
            extra = []
            if name == "llama3":
                factors = frequency_factors(scaling, 32, 10000.0)
                extra = [("rope_freqs.weight", factors.astype(np.float32))]
            rows.append(compare_predictions(folder, f"llama, rope {name}", "llama",
                                            {"rope_scaling": scaling}, fields, extra))
        vocabulary, merges = across_words(text[:400_000])
        kinds = [compare_tokens(folder, kind, bytes_tokenizer(kind, vocabulary, merges),
                                len(vocabulary), texts) for kind in SPLITTERS]
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text[:400_000].splitlines()), model_writer=written,
            model_type="bpe", vocab_size=2000, byte_fallback=True, remove_extra_whitespaces=False,
            normalization_rule_name="identity", user_defined_symbols=["<tool>"], minloglevel=2)
        fields = piece_fields(sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()))
        kinds.append(compare_tokens(folder, "SentencePiece", pieces_tokenizer(fields),
                                    len(fields["tokens"]), texts))
    print(save("against-llamacpp", xllamacpp=version("xllamacpp"), predictions=rows,
               tokenizers=kinds))


if __name__ == "__main__":
    main()
