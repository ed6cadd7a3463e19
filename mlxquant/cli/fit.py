"""``quantize --fit``: choose the options that make what the plan recommends, and print them all.

Where the plan recommends fewer than 4 bits, every layer, and embedding and head, get widths of
their own that together fill the memory: at the same size the model is then better than with one
width for all layers (``benchmarks/LOG.md``).
"""

import shlex
from typing import TYPE_CHECKING, Any

from typer import Context

from mlxquant.base.errors import BadValue
from mlxquant.cli.common import given, print_json, remark

if TYPE_CHECKING:
    from mlxquant.report.plan import PlanRow

_FORM = {"method", "bits", "group_size", "rotate", "replicas", "replica_group"}
# Options that are printed even at their default, beside those of the form.
_SAID = ("method", "bits", "propagation", "embedding_bits", "tune_blocks", "tune_steps", "samples",
         "sequence_length", "seed", "text", "windows")
_OWN = ("fit", "fit_context", "for_chip")  # not printed: they decide the other options


def chosen(ctx: Context) -> tuple[dict[str, Any], str]:
    """The arguments of ``quantize`` for the form that the plan recommends, among those that agree
    with the options given, and the command that chats with the result. Prints the choice, as a
    line of JSON with ``--json``. Raises what ``plan`` and ``choose`` raise."""
    from mlxquant.report.plan import choose, plan

    params, named = ctx.params, given(ctx).keys()
    if named & {"target_bpw", "target_gb"}:
        raise BadValue("--fit and a target are two sizes; give one")
    result = plan(params["model"], memory=params["fit"], chip=params["for_chip"],
                  context=params["fit_context"], revision=params["revision"])
    made = {row: ctx.command.make_context("quantize", shlex.split(row.command)[2:]).params
            for row in result.rows if row.command}
    row = choose(result, [row for row, form in made.items() if all(
        form[name] == params[name] for name in named & _FORM)], params["for_chip"])
    form = made[row] | ({} if named & _FORM else _filling(row, result.memory_bytes))
    wanted = _settled(params | {name: value for name, value in form.items()
                                if name not in named | {"model", "output"}})
    command = _command(ctx, wanted, shlex.split(row.command or ""))
    kv = f" --kv-bits {row.kv_bits}" if row.kv_bits != 16 else ""
    chat = f"mlxquant chat {shlex.quote(str(params['output']))}{kv}"
    if params["as_json"]:
        print_json({"stage": "fit", "machine": result.machine, "memory_bytes": result.memory_bytes,
                    "context": result.context, "form": vars(row), "command": command,
                    "chat": chat}, indent=None)
        return wanted, chat
    for line in result.remarks:
        remark(f"assumed: {line}")
    filled = wanted["target_gb"]
    instead = (f"; in its place layers of several widths, which fill a folder of {filled:g} GB"
               if filled else "")
    print(f"for {result.machine}, {result.memory_bytes / 1e9:.1f} GB for a model and "
          f"{result.context:,} tokens: {row.label()} with {row.kv_bits}-bit keys and values, "
          f"{row.total_bytes / 1e9:.2f} GB in all, perplexity × {row.quality:.2f} "
          f"({row.quality_source}){instead}\n{_texts(wanted)}\n"
          f"the same by hand: {command}", flush=True)
    return wanted, chat


def _filling(row: "PlanRow", memory: int) -> dict[str, Any]:
    """The arguments that fill the memory where the form is below 4 bits; none elsewhere."""
    from mlxquant.codes.width import Width

    if Width.of(row.bits).code_bits > 3:
        return {}
    room = row.file_bytes + memory - row.total_bytes
    return {"target_gb": int(room / 1e6) / 1e3, "embedding_bits": None}


def _settled(wanted: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the defaults of tuning and of the held-out text filled in."""
    from mlxquant.codes.spec import Spec
    from mlxquant.codes.width import Width
    from mlxquant.quantise.job import Job
    from mlxquant.quantise.settings import BlockTuning
    from mlxquant.report.made import SELF

    spec = Spec(Width.of(wanted["bits"]))
    tuning = BlockTuning(wanted["tune_blocks"], wanted["tune_steps"])
    tuned = Job(spec, tuning=tuning).tunes([spec])
    wanted = wanted | {"tune_blocks": tuned, "tune_steps": tuning.steps if tuned else None,
                       "text": wanted["text"] or SELF, "fit": None, "for_chip": None}
    return wanted | ({"data": None, "conversations": 0} if _only_rounds(wanted) else {})


def _only_rounds(wanted: dict[str, Any]) -> bool:
    """Whether no calibration text is read."""
    from mlxquant.codes.spec import Spec, parse_override
    from mlxquant.quantise.job import Job
    from mlxquant.quantise.settings import BlockTuning

    return wanted["method"] == "rtn" and not wanted["activation_bits"] and not Job(
        Spec(method="rtn"), rules=tuple(map(parse_override, wanted["override"] or ())),
        tuning=BlockTuning(wanted["tune_blocks"])).calibrated


def _texts(wanted: dict[str, Any]) -> str:
    """A line for the user: the calibration text, whether blocks are trained, the text to measure
    on."""
    from mlxquant.report.made import SELF

    samples = f"{wanted['samples']} samples of {wanted['sequence_length']} tokens"
    if wanted["conversations"]:
        samples += f", {wanted['conversations']} of them conversations,"
    source = ("none, it is only rounded" if _only_rounds(wanted)
              else f"{samples} from {', '.join(wanted['data'])}" if wanted["data"]
              else f"{samples} that the model writes itself (--data FILE for your own)")
    trained = f"{wanted['tune_steps']} steps each" if wanted["tune_blocks"] else "not trained"
    held_out = "text that the model writes (--text FILE for your own)" if (
        wanted["text"] == SELF) else wanted["text"]
    return f"calibration text: {source}; blocks: {trained}; measured afterwards on: {held_out}"


def _command(ctx: Context, wanted: dict[str, Any], planned: list[str]) -> str:
    """The whole command without ``--fit``; the form's options are those in ``planned``."""
    words = ["mlxquant", "quantize", wanted["model"]]
    for param in ctx.command.params:
        value, option = wanted[param.name or ""], param.opts[0]
        said = param.name in _SAID or option in planned or value != param.get_default(ctx)
        if param.param_type_name == "argument" or param.name in _OWN or value is None or not said:
            continue
        if isinstance(value, bool):
            words += [option] if value else param.secondary_opts
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [option, str(each)]
    return shlex.join(words)
