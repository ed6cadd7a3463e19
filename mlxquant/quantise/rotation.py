"""The fused rotation: rotate the residual stream by one matrix, folded into every weight.

QuaRot (Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456). RMSNorm without its weight commutes
with an orthogonal matrix Q, so Q can be merged into what writes the residual stream (embedding,
o_proj, down_proj) and its transpose into what reads it (q·k·v, gate·up, head), after the norms'
weights have moved into the readers. The checkpoint stays plain MLX affine and runs at full speed.

What it costs: a tied head must be stored apart from the embedding, because the final norm's weight
goes into it alone; and the inputs of o_proj and down_proj themselves stay unrotated.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.errors import Unsupported
from mlxquant.layers.dense import expanded_weight, to_dense

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")


def orthogonal(width: int, seed: int) -> mx.array:
    """A random orthogonal Q (width, width) float32: Hadamard blocks after random signs, mixed
    across blocks by a random orthogonal matrix where the width is no power of two."""
    random = np.random.default_rng(seed)
    block = width & -width  # the largest power of two that divides
    hadamard = np.ones((1, 1))
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    mix, triangle = np.linalg.qr(random.normal(size=(width // block, width // block)))
    mix = mix * np.sign(triangle.diagonal())
    signs = random.choice([-1.0, 1.0], width)
    return mx.array((np.kron(mix, hadamard / np.sqrt(block)) * signs).astype(np.float32))


def check(config: dict[str, Any]) -> None:
    """Raise ``Unsupported`` where the architecture does not allow the fused rotation."""
    if config["model_type"] not in ARCHITECTURES:
        raise Unsupported("the fused rotation needs one RMSNorm before each sub-layer and none "
                          f"after; known to have that: {', '.join(ARCHITECTURES)}, not "
                          f"{config['model_type']}; use the online rotation")


def rotate_ends(network: nn.Module, config: dict[str, Any],
                q: mx.array) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Embedding, final norm and head, rotated: new tensors (float32, by path), and ``config`` with
    the head untied."""
    model = network.model
    embedding, norm = expanded_weight(model.embed_tokens), model.norm.weight.astype(mx.float32)
    head = expanded_weight(network.lm_head) if "lm_head" in network else embedding
    tensors = {"model.embed_tokens.weight": embedding @ q.T,
               "model.norm.weight": mx.ones_like(norm), "lm_head.weight": (head * norm) @ q.T}
    mx.eval(tensors)
    return tensors, config | {"tie_word_embeddings": False}


def rotate_block(block: nn.Module, q: mx.array) -> nn.Module:
    """Fold norms and rotation into a block's matrices, in place; dense float32 afterwards."""
    block = to_dense(block)
    attention, mlp = block.self_attn, block.mlp
    for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))):
        for linear in readers:
            linear.weight = (linear.weight * norm.weight) @ q.T
        norm.weight = mx.ones_like(norm.weight)
    for writer in (attention.o_proj, mlp.down_proj):
        writer.weight = q @ writer.weight
        if "bias" in writer:
            writer.bias = q @ writer.bias
    mx.eval(block.parameters())
    return block
