"""Quantised keys and values: affine, in groups of 32, where a model's cache can do that."""

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.layers.outline import KV_GROUP
from mlxquant.model.loading import LanguageModel

KV_BITS = (2, 3, 4, 5, 6, 8)


def check_kv_bits(model: LanguageModel, bits: int | None) -> None:
    """Try two tokens with quantised keys and values, so that a model says at once what it cannot.

    Raises ``BadValue`` for a width that is none, and ``Unsupported`` for sliding windows, head
    sizes that groups do not divide, or an attention that takes no quantised cache.
    """
    if bits is None:
        return
    if type(bits) is not int or bits not in KV_BITS:
        raise BadValue(f"kv_bits is {bits!r}, allowed are {', '.join(map(str, KV_BITS))}")
    layers, token = make_prompt_cache(model.network), mx.array([[0]])
    try:
        mx.eval(model.network(token, cache=layers))
        maybe_quantize_kv_cache(layers, 0, KV_GROUP, bits)
        mx.eval(model.network(token, cache=layers))
        if not any(hasattr(layer, "bits") for layer in layers):
            raise NotImplementedError("it keeps no keys and values of this kind")
    except (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise Unsupported(f"{model.name} cannot keep its keys and values at {bits} bits in groups "
                          f"of {KV_GROUP}: {reason}; leave kv_bits out") from error
