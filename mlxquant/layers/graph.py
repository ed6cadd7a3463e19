"""What stands before a block's linear layers: a factor to be folded, or a step to be fused.

Paths are those of mlx-lm's blocks with one norm before attention and one
before the MLP (Llama, Qwen 2 and 3, Mistral and their kin). For any other
architecture nothing is folded or fused: factor and step stay where they are.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3

_AFTER_NORM = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
               "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
_FOLDS = ("llama", "qwen2", "qwen3", "mistral")
_SWIGLU = (llama.MLP, qwen2.MLP, qwen3.MLP)  # Mistral's is Llama's


def norm_before(block: nn.Module, paths: list[str], model_type: str) -> str | None:
    """The RMSNorm whose weight scales exactly the input that ``paths`` share, or None."""
    if model_type not in _FOLDS:
        return None
    for norm, readers in _AFTER_NORM.items():
        if set(paths) == set(readers) and isinstance(getattr(block, norm, None), nn.RMSNorm):
            return norm
    return None


def gates_by_swiglu(mlp: nn.Module, model_type: str) -> bool:
    """Whether ``mlp`` computes down_proj(silu(gate_proj(x)) ∘ up_proj(x)) and nothing else."""
    return model_type in _FOLDS and type(mlp) in _SWIGLU


def linear_before(block: nn.Module, paths: list[str], model_type: str) -> str | None:
    """The linear layer whose output rows are exactly the inputs of ``paths``, or None.

    In a gated MLP down_proj reads act(gate)·up, which is linear in up. Attention's
    o_proj reads weighted sums of v's rows; ``shared_factors`` says how.
    """
    if model_type not in _FOLDS:
        return None
    return {"mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj"}.get(
        paths[0] if len(paths) == 1 else "")


def shared_factors(block: nn.Module, before: str, factors: mx.array) -> tuple[mx.array, mx.array]:
    """Factors (n,) that the layer ``before`` can take: (for the reader's inputs, for its rows).

    Grouped-query heads share the rows of v, so the factors of the heads that read
    one key-value head are replaced by their geometric mean.
    """
    rows = len(dict(block.named_modules())[before].weight)
    if rows == len(factors):
        return factors, factors
    kv_heads = block.self_attn.n_kv_heads
    grouped = factors.reshape(kv_heads, -1, rows // kv_heads)
    shared = mx.exp(mx.log(grouped).mean(1, keepdims=True))
    return mx.broadcast_to(shared, grouped.shape).reshape(-1), shared.reshape(-1)
