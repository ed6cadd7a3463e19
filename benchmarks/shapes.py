"""Configurations of models of known shapes, to be filled with random weights."""

from typing import Any


def llama(hidden: int, layers: int, inner: int, heads: tuple[int, int], vocabulary: int,
          tied: bool) -> dict[str, Any]:
    """``heads`` are those of queries, and of keys and values."""
    return {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
            "intermediate_size": inner, "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1], "rms_norm_eps": 1e-5, "rope_theta": 500000,
            "vocab_size": vocabulary, "max_position_embeddings": 131072,
            "tie_word_embeddings": tied}


SHAPES = {"tiny": llama(256, 4, 512, (4, 2), 1000, True),
          "smollm2-135m": llama(576, 30, 1536, (9, 3), 49152, True),
          "smollm2-360m": llama(960, 32, 2560, (15, 5), 49152, True),
          "qwen2.5-0.5b": llama(896, 24, 4864, (14, 2), 151936, True) | {"model_type": "qwen2"},
          "qwen2.5-1.5b": llama(1536, 28, 8960, (12, 2), 151936, True) | {"model_type": "qwen2"},
          "tinyllama-1.1b": llama(2048, 22, 5632, (32, 4), 32000, False),
          "llama-3.2-1b": llama(2048, 16, 8192, (32, 8), 128256, True),
          "llama-3.2-3b": llama(3072, 28, 8192, (24, 8), 128256, True),
          "llama-3.1-8b": llama(4096, 32, 14336, (32, 8), 128256, False),
          "qwen3-30b-a3b": llama(2048, 48, 6144, (32, 4), 151936, False) | {
              "model_type": "qwen3_moe", "head_dim": 128, "num_experts": 128,
              "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
              "mlp_only_layers": [], "norm_topk_prob": True, "attention_bias": False}}
