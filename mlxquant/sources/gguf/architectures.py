"""How GGUF's architectures differ; a new architecture needs only a row in this table.

Names and shapes of weights come from mlx-lm's models and the ``gguf`` package's table of names.
Conventions are those of llama.cpp's converter: it interleaves the rows of query and key where the
original rotates halves but llama.cpp pairs (``permuted``), and adds 1 to Gemma's norms
(``norm_offset``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ROPES = ("linear", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Architecture:
    """``keys`` are entries of config.json by GGUF key (and default, where one is known), beyond
    what all have; ``derived`` are computed from the rest; ``ropes`` the scalings that mlx-lm's
    model knows. ``ignored`` GGUF keys concern features that mlx-lm's model leaves out."""

    model_type: str
    keys: dict[str, str | tuple[str, object]] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    derived: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    ropes: tuple[str, ...] = ()
    permuted: bool = False
    norm_offset: float = 0.0
    epsilon: str = "rms_norm_eps"
    partial_rotary: bool = False
    ignored: tuple[str, ...] = ()


def _gemma_scale(largest: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The attention scale ``query_pre_attn_scalar``, which GGUF does not store: the width of a
    head, but in the model with ``largest`` blocks hidden size / heads. llama.cpp does the same."""

    def derive(config: dict[str, Any]) -> dict[str, Any]:
        mean = config["hidden_size"] / config["num_attention_heads"]
        alone = config["num_hidden_layers"] == largest
        return {"query_pre_attn_scalar": mean if alone else config["head_dim"]}

    return derive


_WINDOW = "attention.sliding_window"

ARCHITECTURES = {
    "llama": Architecture("llama", ropes=ROPES, permuted=True),
    "smollm3": Architecture("smollm3", ropes=ROPES, permuted=True),
    "granite": Architecture("granite", ropes=ROPES, permuted=True, keys={
        "logits_scaling": "logit_scale", "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale"}),
    "qwen2": Architecture("qwen2", ropes=ROPES),
    "qwen3": Architecture("qwen3", ropes=ROPES),
    "qwen3moe": Architecture("qwen3_moe", ropes=ROPES, keys={
        "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length"},
        constants={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}),
    "seed_oss": Architecture("seed_oss", ropes=ROPES),
    "olmo2": Architecture("olmo2", ropes=ROPES),
    "exaone": Architecture("exaone", ropes=ROPES, epsilon="layer_norm_epsilon",
                           keys={"num_layers": "block_count"}),
    "phi3": Architecture("phi3", ropes=("linear", "longrope"), partial_rotary=True,
                         ignored=(_WINDOW,)),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0, derived=_gemma_scale(46),
                           ignored=(_WINDOW,), keys={
                               "attn_logit_softcapping": "attn_logit_softcapping",
                               "final_logit_softcapping": "final_logit_softcapping"}),
    "gemma3": Architecture("gemma3_text", ropes=("linear",), norm_offset=1.0,
                           derived=_gemma_scale(62), constants={"sliding_window_pattern": 6},
                           keys={"sliding_window": _WINDOW,
                                 "rope_local_base_freq": ("rope.freq_base_swa", 10000.0)}),
    "starcoder2": Architecture("starcoder2", epsilon="norm_epsilon"),
    "stablelm": Architecture("stablelm", epsilon="layer_norm_eps", partial_rotary=True,
                             keys={"use_parallel_residual": ("use_parallel_residual", False)}),
    "command-r": Architecture("cohere", epsilon="layer_norm_eps",
                              keys={"logit_scale": "logit_scale"}),
    "cohere2": Architecture("cohere2", epsilon="layer_norm_eps",
                            keys={"logit_scale": "logit_scale", "sliding_window": _WINDOW},
                            constants={"sliding_window_pattern": 4}),
    "glm4": Architecture("glm4", partial_rotary=True),
    "ernie4_5": Architecture("ernie4_5"),
}
