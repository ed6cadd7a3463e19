"""How fast GGUF files are imported, beside what the disk reads and writes.

    python benchmarks/import_speed.py [--blocks 4] [--folder DIR]

Files have Llama 3.2 1B's shapes with fewer blocks, and random codes. They are dropped from the page
cache first; the result counts bytes of the file. ``read`` and ``write`` are those of the same
bytes, in a loop and with fsync.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

# isort: split
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf_files import random_blocks
from record import parser, save

from mlxquant.sources.gguf import import_file

KINDS = {"F16": [Type.F16], "Q8_0": [Type.Q8_0], "Q4_0": [Type.Q4_0], "Q4_K": [Type.Q4_K],
         "Q5_K": [Type.Q5_K], "Q4_K and Q6_K, as Q4_K_M": [Type.Q4_K, Type.Q6_K],
         "Q6_K": [Type.Q6_K], "IQ4_XS": [Type.IQ4_XS]}
WIDTH, KEYS, INNER, VOCABULARY = 2048, 512, 8192, 32768
_CHUNK = 1 << 24


def write_file(path: Path, types: list[Type], blocks: int) -> Path:
    """All matrices of the first type, save those that Q4_K_M widens: of the last."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": 2048, "block_count": blocks, "embedding_length": WIDTH,
                       "feed_forward_length": INNER, "attention.head_count": 32,
                       "attention.head_count_kv": 8}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([str(n) for n in range(1000)])
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for block in range(blocks):
        parts = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH),
                 "attn_k": (KEYS, WIDTH), "attn_v": (KEYS, WIDTH), "attn_output": (WIDTH, WIDTH),
                 "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        shapes |= {f"blk.{block}.{part}": shape for part, shape in parts.items()}
    for name, shape in shapes.items():
        type_ = types[-1 if "attn_v" in name or "ffn_down" in name or "token_embd" in name else 0]
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            continue
        few = random_blocks(type_, 64, shape[1])
        writer.add_tensor(f"{name}.weight", np.tile(few, (shape[0] // 64, 1)), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    forget(path)
    return path


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    if sys.platform != "linux":
        raise SystemExit("only Linux can be told to drop a file from its page cache")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(path: Path) -> tuple[float, float]:
    """GB/s that ``path`` is read with, and a copy of its bytes written."""
    buffer, copy = bytearray(_CHUNK), path.with_suffix(".copy")
    forget(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = path.stat().st_size / (time.perf_counter() - start) / 1e9
    start = time.perf_counter()
    with copy.open("wb", buffering=0) as file:
        for _ in range(0, path.stat().st_size, _CHUNK):
            file.write(buffer)
        os.fsync(file.fileno())
    written = path.stat().st_size / (time.perf_counter() - start) / 1e9
    copy.unlink()
    return read, written


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--folder", type=Path, help="Default: a temporary one.")
    a = options.parse_args()
    base, rows = Path(tempfile.mkdtemp(prefix="mlxquant-import-", dir=a.folder)), []
    try:
        for name, types in KINDS.items():
            path = write_file(base / "model.gguf", types, a.blocks)
            outcome = import_file(path, base / "out")
            read, written = disk(path)
            rows.append({"kind": name, "file_gb": path.stat().st_size / 1e9,
                         "seconds": outcome.seconds,
                         "gb_per_s": outcome.bytes / outcome.seconds / 1e9,
                         "disk_read_gb_per_s": read, "disk_write_gb_per_s": written})
            print(f"{name}: {rows[-1]['file_gb']:.2f} GB at {rows[-1]['gb_per_s']:.2f} GB/s; "
                  f"disk {read:.2f} read, {written:.2f} written", flush=True)
            shutil.rmtree(base / "out")
    finally:
        shutil.rmtree(base)
    print(save("import-speed", blocks=a.blocks, rows=rows))


if __name__ == "__main__":
    main()
