"""Decoding a model's shape with random weights: replicated layers beside mlx-lm's own formats.

    python benchmarks/decode_shape.py [--out NAME] [--layers 32] [--plan 2:4:16 stock:4 stock:2 …]

The shape is Llama 3.1 8B's. Random weights decode as fast as trained ones. A row is BITS:K:G or stock:BITS.
"""

import argparse
import statistics
import time

import mlxquant  # first: it loads the BLAS before MLX
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.layers.packed import pack
from mlxquant.layers.replicated import ReplicatedLinear, install_group
from mlxquant.quant.spec import ReplicaShape
from mlxquant.roofline import traffic
from mlxquant.roofline.probe import read_ceiling
from record import save

SHAPE = dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, intermediate_size=14336,
             num_attention_heads=32, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, vocab_size=128256,
             rope_theta=500000.0, max_position_embeddings=131072, tie_word_embeddings=False)
GROUPS = {"self_attn": {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)},
          "mlp": {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}}
PLAN = ["stock:4", "stock:2", "2:1:0", "2:4:0", "2:4:16", "2:8:16", "ternary:4:16", "4:4:16"]


def build(row: str, layers: int) -> nn.Module:
    """A network of the shape in bfloat16 with random weights in the row's format; the head is 4-bit in all rows."""
    network = llama.Model(llama.ModelArgs.from_dict(SHAPE | {"num_hidden_layers": layers}))
    bits, *rest = row.split(":")
    if bits != "stock":
        spec = ReplicaShape(int(bits) if bits.isdecimal() else bits, int(rest[0]), int(rest[1]), 64)
        for layer in network.model.layers:
            for part, groups in GROUPS.items():
                for name, members in groups.items():
                    install_group(layer[part], name, {m: layer[part][m] for m in members}, spec)
    network.set_dtype(mx.bfloat16)
    for _, module in network.named_modules():
        if isinstance(module, ReplicatedLinear):
            kind = module.codes.dtype
            module.codes = mx.random.randint(0, 255 if kind == mx.uint8 else 2**31 - 1, module.codes.shape).astype(kind)
            module.replica_out = mx.random.normal(module.replica_out.shape, mx.bfloat16) / 64
            module.input.replica_in = mx.random.normal(module.input.replica_in.shape, mx.bfloat16)
            if "column_scale" in module.input:
                module.input.column_scale = mx.ones(module.input.column_scale.shape, mx.bfloat16)
    width = int(rest[0]) if bits == "stock" else 4
    nn.quantize(network, 64, 4, class_predicate=lambda path, m: isinstance(m, (nn.Linear, nn.Embedding))
                and {"bits": width if ".layers." in path else 4, "group_size": 64})
    network = pack(network)
    mx.eval(network.parameters())
    mx.clear_cache()
    return network


def measure(network: nn.Module, tokens: int, repeats: int) -> tuple[float, float]:
    """Mean and standard deviation of tokens/s in decoding, after a prompt of 8."""
    rates = []
    for repeat in range(repeats + 1):
        steps = generate_step(mx.arange(8) + 1000, network, max_tokens=tokens + 1,
                              prompt_cache=make_prompt_cache(network))
        next(steps)
        start = time.perf_counter()
        count = sum(1 for _ in steps)
        if repeat:
            rates.append(count / (time.perf_counter() - start))
    return statistics.mean(rates), statistics.stdev(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="decode-shape")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plan", nargs="+", default=PLAN)
    arguments = parser.parse_args()
    ceiling, rows = read_ceiling(), []
    config = SHAPE | {"num_hidden_layers": arguments.layers}
    for row in arguments.plan:
        network = build(row, arguments.layers)
        size = traffic.weight_bytes(network, config)
        mean, deviation = measure(network, arguments.tokens, arguments.repeats)
        rows.append(dict(format=row, tps_mean=mean, tps_stdev=deviation, bytes_per_token=size,
                         gb_per_s=mean * size / 1e9, percent_of_probe=100 * mean * size / 1e9 / ceiling.gb_per_s))
        print(f"{row:14} {mean:7.1f} ± {deviation:.1f} tokens/s, {size / 1e9:.3f} GB/token, "
              f"{rows[-1]['gb_per_s']:.0f} GB/s = {rows[-1]['percent_of_probe']:.0f} %", flush=True)
        save(arguments.out, layers=arguments.layers, tokens=arguments.tokens, ceiling=ceiling.__dict__, rows=rows)
        del network
        mx.clear_cache()


if __name__ == "__main__":
    main()
