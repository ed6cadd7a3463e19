"""Feed mutated files to both parsers: they may end in an error of ours, in nothing else.

    python benchmarks/fuzz.py [--count 100000] [--seconds 600] [--bodies 10000]

No other exception, no hang, no memory beyond what the file's size explains. GGUF files go through
headers, configuration, names, shapes and tokenizer, safetensors folders through headers, index and
configuration. A case is its number: it makes the mutations, so that a failure can be run again.
Cases run in processes with a limit on memory, each case under a timer; a process that dies names
the case it was at. Then mutated request bodies go to the server (``fuzz_bodies.py``); with
``--count 0`` only those, and what is known of files is kept.
"""

import argparse
import datetime
import json
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_bodies
import gguf
import numpy as np
from record import parser, read, save

from mlxquant.base.errors import MlxquantError
from mlxquant.sources import checkpoint
from mlxquant.sources.gguf import model, tokenizer
from mlxquant.sources.gguf.reader import open_model

CHUNK = 2000  # cases in a process
LIMIT = 2 << 30  # address space that a process may take beyond what it started with
SECONDS = 10  # of one case; a machine may be busy
# A Python object takes more than the bytes it was read from: a string of one byte, nine bytes of
# file, takes 58 and 8 in its list; names are kept, looked up and joined. So the bound is a multiple
# of the file's size, whatever its header claims.
PER_BYTE, FIXED = 64, 4 << 20


def seed_gguf(path: Path, *, pieces: bool) -> bytes:
    """A small, whole file; ``pieces`` gives it a SentencePiece vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": 64, "block_count": 1, "embedding_length": 32,
                       "feed_forward_length": 32, "attention.head_count": 2,
                       "attention.head_count_kv": 1, "rope.dimension_count": 16}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    words = ["<|endoftext|>", *"abcdefgh", "ab", "abc"]
    if pieces:
        words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(8)), "▁", "a", "b", "ab",
                 "▁ab"]
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    if pieces:
        writer.add_token_scores([-float(n) for n in range(len(words))])
        writer.add_token_types([2, 3, 3] + [6] * 8 + [1] * 5)
    else:
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_merges(["a b", "ab c"])
        writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_list(words)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
              "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
              "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (32, 32),
              "blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32)}
    for name, shape in shapes.items():
        type_ = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ones(shape, np.float32), type_)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def seed_safetensors() -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position = 0
    for index in range(6):
        dtype = ["F32", "F16", "U32"][index % 3]
        end = position + (16 if dtype == "F16" else 32)
        header[f"model.layers.{index}.weight"] = {"dtype": dtype, "shape": [4, 2],
                                                  "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(position)


SEED_INDEX = {"metadata": {"total_size": 160},
              "weight_map": {f"model.layers.{index}.weight": "model.safetensors"
                             for index in range(6)}}
NUMBERS = [0, 1, 2, 7, 31, 32, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62,
           2**63 - 1, 2**63, 2**64 - 1]
SCRAPS = [b"\x00", b"\xff" * 8, b'"', b"{", b"[" * 50, b"null", b"-1", b"1e999",
          b"../../etc/passwd", b"NaN", b"true", "▁".encode(), b"blk.0.", b".weight",
          b"token_embd.weight", b"\xf0\x9f"]


def mutated(data: bytes, chance: random.Random, header: int) -> bytes:
    """``data`` after one to four mutations, most of them in its first ``header`` bytes."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        if not made:
            break
        reach = min(header if chance.random() < 0.95 else len(made), len(made))
        at = chance.randrange(reach)
        kind = chance.randrange(9)
        if kind == 0:
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            made[at] = chance.randrange(256)
        elif kind in (2, 3):
            width = chance.choice("BHIQ")
            size = struct.calcsize(width)
            number = chance.choice([*NUMBERS, len(data), chance.getrandbits(64)]) % 2 ** (8 * size)
            made[at:at + size] = struct.pack(f"<{width}", number)
        elif kind == 4:
            del made[at:at + chance.choice((1, 2, 8, 40, 1000))]
        elif kind == 5:
            made[at:at] = chance.choice(SCRAPS)
        elif kind == 6:
            made[at:at] = made[at:at + chance.choice((1, 8, 60))] * chance.choice((1, 2, 50))
        elif kind == 7:
            del made[at:]
        else:  # a number in text, as headers in JSON have it
            digits = [i for i, byte in enumerate(made[:reach]) if 48 <= byte < 58]
            if digits:
                at = chance.choice(digits)
                made[at:at + 1] = str(chance.choice(NUMBERS)).encode()
    return bytes(made)


class Fuzzer:
    """Runs cases in a folder: ``run`` returns the outcome, or raises what no file may cause."""

    def __init__(self, folder: Path):
        self.folder, self.gguf = folder, folder / "m.gguf"
        self.most = 0, 0  # bytes taken, and of a file of how many
        self.seeds = [seed_gguf(folder / "seed.gguf", pieces=pieces) for pieces in (False, True)]
        self.headers = [data.find(b"blk.0.ffn_down.weight") + 60 for data in self.seeds]
        self.safetensors, self.index = seed_safetensors(), json.dumps(SEED_INDEX).encode()
        self.config = json.dumps({"model_type": "llama", "hidden_size": 8}).encode()

    def run(self, number: int) -> str:
        chance = random.Random(number)
        if number % 2:
            return self._gguf(chance)
        return self._safetensors(chance)

    def _gguf(self, chance: random.Random) -> str:
        which = chance.randrange(2)
        self.gguf.write_bytes(mutated(self.seeds[which], chance, self.headers[which]))

        def read() -> None:
            file = open_model(self.gguf)
            imported = model.read(file)
            tokenizer.files(file)
            for _ in imported.tensors():
                pass

        return self._watched("gguf", read, self.gguf.stat().st_size)

    def _safetensors(self, chance: random.Random) -> str:
        files = {"model.safetensors": self.safetensors, "model.safetensors.index.json": self.index,
                 "config.json": self.config}
        for name, share in zip(files, (0.8, 0.2, 0.1)):
            if chance.random() < share:
                files[name] = mutated(files[name], chance, 900)
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        return self._watched("safetensors", lambda: checkpoint.validate(self.folder),
                             sum(map(len, files.values())))

    def _watched(self, kind: str, parse: Callable[[], object], size: int) -> str:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            parse()
            outcome = "accepted"
        except MlxquantError as error:
            if "\n" in str(error):
                raise ValueError(f"more than one line: {error}") from error
            outcome = type(error).__name__
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        taken = tracemalloc.get_traced_memory()[1] - before
        self.most = max(self.most, (taken, size))
        if taken > PER_BYTE * size + FIXED:
            raise MemoryError(f"{taken} bytes were taken for a file of {size}")
        return f"{kind} {outcome}"


def hang(*_: object) -> None:
    raise TimeoutError(f"a case took more than {SECONDS} s")


def chunk(first: int, last: int, folder: Path) -> None:
    """Run cases ``first`` to ``last`` and print what came of them as JSON.

    A file holds the number under way.
    """
    signal.signal(signal.SIGALRM, hang)
    fuzzer = Fuzzer(folder)
    fuzzer.run(1)  # loads what is loaded lazily, before memory is counted
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, now + LIMIT))
    tracemalloc.start()
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    for number in range(first, last):
        (folder / "number").write_text(str(number))
        try:
            outcomes[fuzzer.run(number)] += 1
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            text = "".join(traceback.format_exception(error))
            failures.append({"case": number, "error": text[-1500:]})
    print(json.dumps({"outcomes": outcomes, "failures": failures, "most": fuzzer.most}))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--count", type=int, default=100_000)
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--bodies", type=int, default=10_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--chunk", type=int, nargs=2, help=argparse.SUPPRESS)
    a = options.parse_args()
    if a.chunk:
        with tempfile.TemporaryDirectory(prefix="mlxquant-fuzz-") as folder:
            first, last = a.chunk
            chunk(first, last, Path(folder))
        return
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    done, most, start = 0, [0, 0], time.perf_counter()
    while done < a.count and time.perf_counter() - start < a.seconds:
        first, last = a.first + done, a.first + min(done + CHUNK, a.count)
        result = subprocess.run([sys.executable, __file__, "--chunk", str(first), str(last)],
                                capture_output=True, text=True)
        if result.returncode:
            failures.append({"cases": [first, last], "exit": result.returncode,
                             "error": result.stderr[-1500:]})
        else:
            made = json.loads(result.stdout)
            outcomes.update(made["outcomes"])
            failures += made["failures"]
            most = max(most, made["most"])
        done = last - a.first
        print(f"{done} files, {len(failures)} failures, {time.perf_counter() - start:.0f} s",
              file=sys.stderr, flush=True)
    files = dict(files=done, files_date=datetime.date.today().isoformat(),
                 seconds=time.perf_counter() - start,
                 outcomes=dict(sorted(outcomes.items())), most_bytes_taken=most[0],
                 by_a_file_of=most[1], failures=failures)
    server = fuzz_bodies.run(a.first, a.bodies, mutated)
    for failure in (failures + server["failures"])[:5]:
        print(failure["error"], file=sys.stderr)
    if not a.count:  # what is known of files stays, with its own date
        known = read("fuzz")
        known.setdefault("files_date", known["date"])
        files = {name: known[name] for name in files}
    print(save("fuzz", **files, server=server))
    sys.exit(1 if failures or server["failures"] else 0)


if __name__ == "__main__":
    main()
