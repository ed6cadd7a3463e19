"""mlx-lm's own RTN, AWQ, GPTQ and DWQ on the same model, text and calibration tokens.

    python benchmarks/stock_methods.py --text WIKITEXT --data FILE [FILE …] [--model NAME]

mlx-lm's commands fetch their calibration text from the network; here their functions are called
with our tokens instead. Its embedding width is its own, so after each method the original embedding
is put back: rows compare the body.
"""

import time
import traceback
from pathlib import Path

from record import parser, save  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.gptq import gptq_quantize

import mlxquant
from mlxquant.layers.dense import to_dense
from mlxquant.quantise import calibration
from mlxquant.report.divergence import divergence
from mlxquant.sources.names import DEFAULT_MODEL

GROUP = 64
PLAN = ["rtn:4", "gptq:4", "awq:4", "dwq:4", "rtn:3", "awq:3", "dwq:3", "rtn:2", "gptq:2", "awq:2",
        "dwq:2"]


def body_rtn(network: nn.Module, bits: int) -> None:
    nn.quantize(network, GROUP, bits, class_predicate=lambda path, m: isinstance(m, nn.Linear))


def apply(method: str, bits: int, network: nn.Module, teacher: nn.Module,
          tokens: mx.array) -> nn.Module:
    """Run one of mlx-lm's methods on ``network`` in place."""
    if method == "rtn":
        body_rtn(network, bits)
    elif method == "gptq":
        network, _ = gptq_quantize(network, tokens, bits, GROUP, 8, GROUP)
    elif method == "awq":
        awq_quantize(network, tokens, AWQ_MODEL_CONFIGS["llama"], group_size=GROUP, bits=bits,
                     embed_group_size=32, embed_bits=8)
    else:
        body_rtn(network, bits)
        rows = [(row, 0) for row in np.array(tokens).tolist()]

        def targets(batch: mx.array, *_: object, **__: object) -> mx.array:
            return mx.stop_gradient(teacher(batch))

        dwq_quantize(network, targets, optim.Adam(learning_rate=1e-6), rows, rows[:8], batch_size=4,
                     max_seq_length=tokens.shape[1], seed=0, dtype=mx.float32)
    return network


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", required=True)
    options.add_argument("--data", nargs="+", required=True)
    options.add_argument("--model", default=DEFAULT_MODEL)
    options.add_argument("--windows", type=int, default=40)
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--plan", nargs="+", default=PLAN)
    a = options.parse_args()
    teacher = mlxquant.load(a.model, dense=True)
    tokens = calibration.from_files(teacher.tokenizer, a.data, a.samples,
                                    vocabulary=teacher.vocabulary)
    rows = []
    for step in a.plan:
        method, _, bits = step.partition(":")
        try:
            student = mlxquant.load(a.model, dense=True)
            embedding = student.network.model.embed_tokens
            mx.reset_peak_memory()
            start = time.perf_counter()
            student.network = apply(method, int(bits), student.network, teacher.network,
                                    mx.array(tokens.tokens))
            mx.eval(student.network.parameters())
            seconds, peak = time.perf_counter() - start, mx.get_peak_memory() / 1e9
            student.network.model.embed_tokens = embedding
            student.network = to_dense(student.network)
            q = divergence(student, teacher, Path(a.text), windows=a.windows)
            rows.append(dict(method=f"mlx-lm {method}", bits=int(bits), group_size=GROUP,
                             bits_per_weight=int(bits) + 32 / GROUP, perplexity=q.perplexity,
                             kl_mean=q.kl_mean, top1_agreement=q.top1_agreement, seconds=seconds,
                             peak_memory_gb=peak))
            print(f"{method} {bits}: {q.perplexity:.3f} ppl, KL {q.kl_mean:.4f}, {seconds:.1f} s",
                  flush=True)
            save("stock-methods", windows=a.windows, samples=a.samples, rows=rows)
        except Exception:  # one method's failure must not cost the others' measurements
            traceback.print_exc()


if __name__ == "__main__":
    main()
