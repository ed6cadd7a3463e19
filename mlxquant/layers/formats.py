"""Which layers a checkpoint's tensors are loaded into, according to its config.json.

A plain checkpoint is mlx-lm's alone. Ours says ``"model_type": "mlxquant"``, so that stock
mlx-lm refuses it instead of running rotated codes as if they were plain; the architecture is in
``base_model_type``, and ``mlxquant.layers`` describes single layers that stock mlx-lm does not
have, ``mlxquant.replicas`` the sets of replicated layers that share an input and
``mlxquant.repeats`` the ranges of blocks that run more than once.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes

from mlxquant.base.errors import BadCheckpoint, BadValue, Unsupported
from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers import repeated
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.repeated import Repeat
from mlxquant.layers.replicated import install_group
from mlxquant.layers.transformed import TransformedLinear

FORMAT = 1
Entries = dict[str, dict[str, Any]]


def stored_entry(module: nn.Module) -> dict[str, Any]:
    """The config entry of a quantised layer of MLX as it is."""
    mode = getattr(module, "mode", "affine")
    entry = {"group_size": module.group_size, "bits": module.bits}
    return entry if mode == "affine" else entry | {"mode": mode}


def config_with(config: dict[str, Any], layers: Entries, replicas: Entries | None = None,
                repeats: Sequence[Repeat] = ()) -> dict[str, Any]:
    """``config`` marked as ours, or unchanged where it needs no layer or repeat of ours.

    ``layers`` are entries for ``make`` by path. ``replicas`` are entries by the path of the
    siblings' ``ReplicaInput``, such as ``model.layers.0.self_attn.qkv``: the fields of its
    ``ReplicaShape``, and under ``"linears"`` the names, beside that path, of the siblings: linear
    layers, or stacks of a mixture's experts.
    """
    if not layers and not replicas and not repeats:
        return config
    base = config.get("base_model_type", config["model_type"])
    return config | {"model_type": "mlxquant", "base_model_type": base,
                     "mlxquant": {"format": FORMAT, "layers": layers, "replicas": replicas or {},
                                  "repeats": [asdict(repeat) for repeat in repeats]}}


def model_classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], Any]:
    """mlx-lm's hook: the model class and argument class for a configuration."""
    if config.get("model_type") != "mlxquant":
        return _get_classes(config)
    block = config.get("mlxquant")
    if not isinstance(block, dict) or "base_model_type" not in config:
        raise BadCheckpoint("config.json says mlxquant but lacks its block or base_model_type")
    if block.get("format") != FORMAT:
        raise Unsupported(f"checkpoint format {block.get('format')!r}; this version reads {FORMAT}")
    base = config | {"model_type": config["base_model_type"]}
    model_class, arguments = _get_classes(base)

    def build(arguments: Any) -> nn.Module:
        network: nn.Module = model_class(arguments)
        install(network, block.get("layers", {}), block.get("replicas", {}))
        _install_repeats(network, block.get("repeats", []))
        return network

    return build, SimpleNamespace(from_dict=lambda _: arguments.from_dict(base))


def install(module: nn.Module, layers: Entries, replicas: Entries | None = None) -> None:
    """Put the described layers, with empty parameters, in the place of the linear ones.

    Paths are those below ``module``: a whole network or one block. Raises ``BadCheckpoint`` or
    ``Unsupported`` for a description that does not fit it.
    """
    found = dict(module.named_modules())
    made = []
    for path, entry in layers.items():
        linear = found.get(path)
        if not isinstance(linear, nn.Linear):
            raise BadCheckpoint(f"config.json describes {path}, which is no linear layer of the "
                                "model")
        made.append((path, make(linear, entry)))
    module.update_modules(tree_unflatten(made))
    _install_replicas(module, replicas or {})


def _install_replicas(module: nn.Module, replicas: Entries) -> None:
    keys = {field.name for field in fields(ReplicaShape)} | {"linears"}
    found = dict(module.named_modules())
    for path, entry in replicas.items():
        if not isinstance(entry, dict) or entry.keys() != keys or not entry["linears"]:
            raise BadCheckpoint(f"config.json describes the replicas of {path} as {entry!r}; "
                                f"needed are {', '.join(sorted(keys))}")
        above, _, name = path.rpartition(".")
        linears = {}
        for linear in entry["linears"]:
            below = f"{above}.{linear}" if above else linear
            linears[linear] = found.pop(below, None)  # so that no other entry takes it too
            if not isinstance(linears[linear], (nn.Linear, SwitchLinear)):
                raise BadCheckpoint(f"config.json describes {below}, which is no linear layer of "
                                    "the model")
        shape = {key: value for key, value in entry.items() if key != "linears"}
        try:
            install_group(found[above], name, linears, ReplicaShape(**shape))
        except BadValue as error:
            raise BadCheckpoint(f"config.json describes the replicas of {path}: "
                                f"{error}") from error


def _install_repeats(network: nn.Module, repeats: list[dict[str, Any]]) -> None:
    keys = {field.name for field in fields(Repeat)}
    if not isinstance(repeats, list) or any(not isinstance(entry, dict) or entry.keys() != keys
                                            for entry in repeats):
        raise BadCheckpoint(f"config.json describes repeated blocks as {repeats!r}; "
                            f"needed is a list with {', '.join(sorted(keys))} each")
    try:
        repeated.install(network, [Repeat(**entry) for entry in repeats])
    except BadValue as error:
        raise BadCheckpoint(f"config.json describes repeated blocks: {error}") from error


def make(linear: nn.Linear, entry: dict[str, Any]) -> nn.Module:
    """The layer that ``entry`` describes, shaped like ``linear``; raises ``Unsupported``."""
    if unknown := entry.keys() - {"grouped", "transform"}:
        raise Unsupported(f"a layer is stored with {', '.join(sorted(unknown))}, which this "
                          "version does not read; it knows grouped and transform")
    inner = linear
    outputs, inputs = linear.weight.shape
    if grouped := entry.get("grouped"):
        inner = GroupedLinear(inputs, outputs, grouped["bits"], grouped["group_size"],
                              "bias" in linear)
    if transform := entry.get("transform"):
        return TransformedLinear.from_config(inner, transform)
    return inner
