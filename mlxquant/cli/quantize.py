"""The verb quantize: from a model to a smaller one, by what was asked or by what fits."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from mlxquant.base.errors import BadValue
from mlxquant.base.text import clean
from mlxquant.cli import fit as fitting
from mlxquant.cli import options as option
from mlxquant.cli.common import Advance, Panels, app, print_json, progress, remark
from mlxquant.cli.options import advanced

if TYPE_CHECKING:
    from mlxquant.codes.spec import Spec
    from mlxquant.quantise.job import Made
    from mlxquant.report.made import HeldOut

# Titles of the bars of what quantising does, by stage.
_STAGES = {"quantising": "quantising, seconds:", "weighing": "weighing layers, seconds:",
           "tuning": "tuning the block, 100 × error left:"}


@app.command(cls=Panels,
             epilog="Example: mlxquant quantize smollm2-135m -o small --bits 3 --data text.txt")
def quantize(
    ctx: Context, model: option.Model, output: option.NewFolder,
    fit: Annotated[str | None, Option(
        metavar="SIZE",
        help="What `plan` recommends for a machine of this memory, e.g. 16GB, among the forms that "
             "agree with the other options, and below 4 bits all that fits, layer by layer; says "
             "what it chose.")] = None,
    for_chip: Annotated[str | None, Option(
        help="The chip that is to run it, e.g. 'M1 Pro', for --fit; for replicas, inputs share a "
             "scaling in the smallest group that is predicted to cost no time there.")] = None,
    method: Annotated[str, Option(help="rtn, gptq, awq, smoothquant or replica.")] = "gptq",
    bits: Annotated[str, Option(help="1, ternary, 2, 3, 4, 5, 6 or 8.")] = "4",
    group_size: option.GroupSize = 64,
    rotate: Annotated[bool, Option(
        "--rotate", help="Rotate every layer's input by a block Hadamard at run time.")] = False,
    replicas: Annotated[int, Option(help="replica: how often each code is used, 1 to 16.")] = 4,
    target_bpw: Annotated[float | None, Option(
        help="Give each layer its own width: bits per weight of the body.")] = None,
    embedding_bits: Annotated[int | None, Option(
        help="Width of embedding and head; default: as stored, or with --target-gb the one with "
             "which the model predicts best.")] = None,
    tune_blocks: Annotated[bool | None, Option(
        "--tune-blocks/--no-tune-blocks", show_default=False,
        help="Train each block's scales and codes until it gives what the original's does; "
             "default: blocks with layers below 4 bits, but for rtn.")] = None,
    data: option.Data = None,
    conversations: Annotated[int, Option(
        help="So many of --samples are talk that the model has with itself; for a chat model.",
    )] = 0,
    text: Annotated[str | None, Option(
        metavar="FILE|self",
        help="Afterwards, perplexity and divergence from MODEL on this text, another than --data; "
             "self, as --fit has it by default: one that MODEL writes.")] = None,
    rotate_fused: Annotated[bool, advanced(
        "--rotate-fused",
        help="Rotate the residual stream once, merged into the weights.")] = False,
    replica_group: Annotated[int, advanced(
        help="replica: inputs that share a scaling but for one factor each: 8, 16, 32 or 64; "
             "0: none.")] = 0,
    symmetric: Annotated[bool, advanced("--symmetric", help="Levels mirror around zero.")] = False,
    act_order: Annotated[bool, advanced(help="GPTQ: most active inputs first.")] = True,
    refine: Annotated[int, advanced(
        help="GPTQ: rounds that move codes and scales once more.")] = 3,
    propagation: Annotated[str, advanced(
        help="Calibrate a block on the inputs of the float model, of the quantised one, "
             "or corrected for the difference.")] = "quantised",
    override: Annotated[list[str] | None, advanced(
        help="'GLOB:bits=4,group_size=64' for some layers; repeatable.")] = None,
    target_gb: Annotated[float | None, advanced(
        help="As --target-bpw, to gigabytes (10^9 bytes) of the whole folder.")] = None,
    siblings_alike: Annotated[bool, advanced(
        "--siblings-alike",
        help="With a target, replica: q, k and v get one width, gate and up too; faster, a little "
             "worse.")] = False,
    activation_bits: Annotated[int | None, advanced(
        help="Round activations too (simulated), e.g. 8.")] = None,
    activation_granularity: Annotated[str, advanced(help="token, tensor or static.")] = "token",
    alpha: Annotated[float | None, advanced(
        help="SmoothQuant's strength, 0 to 1; default: searched.")] = None,
    repeat_blocks: Annotated[list[str] | None, advanced(
        help="8:16x2 runs each of blocks 8 to 15 twice in a row, on weights stored once; "
             "repeatable. Changes nothing until the result is tuned.")] = None,
    repeat_span: Annotated[list[str] | None, advanced(
        help="8:16x2 runs blocks 8 to 15 in turn, and then all of them again; "
             "repeatable.")] = None,
    tune_steps: Annotated[int | None, advanced(
        help="Steps for each block; default: 320 on a GPU, 32 without one.")] = None,
    samples: option.Samples = 128, sequence_length: option.Length = 512, seed: option.ByteSeed = 0,
    windows: Annotated[int, advanced(
        help="Windows of --sequence-length tokens that --text is measured on.")] = 16,
    fit_context: Annotated[int, advanced(
        help="Tokens of conversation that --fit leaves room for.")] = 8192,
    revision: option.Revision = None,
    as_json: Annotated[bool, Option(
        "--json", help="Print JSON on stdout: a line when a block is done, and one at the end.",
    )] = False,
) -> None:
    """Quantise a model block by block; a killed run goes on where it was."""
    if fit is not None:
        arguments, chat = fitting.chosen(ctx)
        quantize(ctx, **arguments)
        if not as_json:
            print(chat)
        return
    from mlxquant.codes.spec import Spec, parse_override
    from mlxquant.codes.width import Width
    from mlxquant.layers.repeated import parse_repeat
    from mlxquant.layers.transformed import ActivationSpec
    from mlxquant.quantise.job import Job, Target, Text
    from mlxquant.quantise.pipeline import quantize as run
    from mlxquant.quantise.settings import BlockTuning
    from mlxquant.report.made import HeldOut

    if rotate and rotate_fused:
        raise BadValue("--rotate and --rotate-fused are two forms of one thing; give one")
    budget = target_bpw is not None or target_gb is not None
    if siblings_alike and not budget:
        raise BadValue("--siblings-alike is for budgets; give --target-bpw or --target-gb with it")
    repeats = [block for each in repeat_blocks or () for block in parse_repeat(each).one_by_one()]
    repeats += map(parse_repeat, repeat_span or ())
    rules = tuple(parse_override(each) for each in override or ())
    methods = {method, *(changes.get("method") for _, changes in rules)}
    if for_chip is not None and "replica" not in methods:
        raise BadValue("--for-chip is for --fit, and for replicas")
    spec = Spec(Width.of(bits), group_size, symmetric, method, act_order, refine,
                "online" if rotate else "fused" if rotate_fused else None, replicas,
                replica_group or _free_group(for_chip, bits, replicas))
    job = Job(
        spec, rules=rules,
        text=Text(tuple(data or ()), samples, sequence_length, conversations),
        target=Target(target_bpw, target_gb, siblings_alike) if budget else None,
        propagation=propagation, embedding_bits=embedding_bits,
        activation=None if activation_bits is None else (
            ActivationSpec(activation_bits, activation_granularity)),
        alpha=alpha, repeats=tuple(repeats), seed=seed,
        tuning=BlockTuning(tune_blocks, tune_steps))
    if (data or conversations or tune_steps is not None) and not job.calibrated:
        raise BadValue("--data, --conversations and --tune-steps are without effect: rtn only "
                       "rounds, unless --tune-blocks is given")
    if for_chip is None:
        _warn_of_slow_replicas(spec)
    held_out = HeldOut(text, windows, sequence_length, seed + 1) if text else None
    if held_out is not None:
        held_out.check(model, data or [], revision)
    with progress(_STAGES["quantising"]) as advance:
        made = run(model, output, job, revision=revision, progress=_teller(advance, as_json))
    _report(made, as_json)
    if held_out is not None:
        _measure(held_out, output, model, revision, as_json)


def _report(made: "Made", as_json: bool) -> None:
    from mlxquant.model.inspection import gain_line, inspect
    from mlxquant.quantise.block_tuning import UNTUNED

    result = inspect(str(made.folder))
    if as_json:
        print_json({"folder": str(made.folder), "bits_per_weight": result.bits_per_weight,
                    "file_bytes": result.file_bytes, "seconds": made.seconds,
                    "peak_memory_gb": made.peak_memory / 1e9, "added_error": made.added,
                    "inherited_error": made.inherited, "tuned_blocks": made.tuned,
                    "notes": made.notes, "profile": made.profile}, indent=None)
    else:
        print(clean(_errors(made)))
        if made.tuned:
            print(f"tuned: {gain_line(made.tuned)}")
        for note in made.notes:
            (print if UNTUNED in note else remark)(clean(note))
        print(f"{made.folder}: {result.bits_per_weight:.2f} bits per weight of the body, "
              f"{result.file_bytes / 1e6:.1f} MB on disk, {made.seconds:.0f} s, "
              f"peak {made.peak_memory / 1e9:.2f} GB", flush=True)


def _measure(held_out: "HeldOut", output: Path, model: str, revision: str | None,
             as_json: bool) -> None:
    from mlxquant.report.made import SELF

    with progress("held-out text, divergence in nats:") as advance:
        quality = held_out.measure(
            output, model, revision, progress=advance, writing=lambda done, total: advance(
                done, total, None, "held-out text written, windows:"))
    if as_json:
        print_json({"stage": "measured", **asdict(quality)}, indent=None)
    else:
        print(f"{quality.line()}\nmeasured on " + (
            "text that the original wrote" if held_out.text == SELF else clean(held_out.text)))


def _teller(advance: Advance, as_json: bool) -> Callable[[int, int, float, str], None]:
    """A function of (done, total, value, stage) that moves the bars and, with ``as_json``, prints a
    line of JSON for each block but not for tuning steps. ``value`` is the seconds since the stage
    began, or 100 × the error of the block that is tuned."""
    from mlxquant.quantise.profile import Pace

    paces, began = {stage: Pace() for stage in _STAGES}, time.monotonic()

    def tell(done: int, total: int, value: float, stage: str) -> None:
        nonlocal began
        if stage == "tuning":  # steps of one block
            began = time.monotonic() if not done else began
            left = (time.monotonic() - began) * (total - done) / done if done else None
        else:
            left = paces[stage].left(done, total, value)
        advance(done, total, value, _STAGES[stage], left)
        if as_json and stage != "tuning":
            print_json({"stage": stage, "blocks_done": done, "blocks": total,
                        "seconds": value, "seconds_left": left}, indent=None)

    return tell


def _free_group(chip: str | None, bits: str, replicas: int) -> int:
    """The number of inputs that must share a scaling so that replicas cost no time on ``chip``: 0
    where no sharing is needed, or no chip was named."""
    if chip is None:
        return 0
    from mlxquant.machine import chips
    from mlxquant.report import lanes

    found = chips.find(chip)
    if (limits := lanes.limits(found)) is None:
        raise BadValue(f"{found.label}: its GPU cores, clock or bandwidth are not in the table")
    group = limits.group_for(bits, replicas)
    if group is None:
        raise BadValue(f"{replicas} replicas of {bits} bits cost time on {found.label} in any "
                       "group; fewer replicas, or --replica-group, are allowed")
    if group:
        remark(f"scalings are shared by {group} inputs: {found.label} runs {replicas} replicas "
               "without losing time then, by prediction")
    return group


def _warn_of_slow_replicas(spec: "Spec") -> None:
    """Say so where these replicas are known to cost time on this machine, measured or predicted."""
    from mlxquant.machine import chips
    from mlxquant.report import lanes
    from mlxquant.runtime.probe import replica_limits

    if spec.method != "replica":
        return
    chip, shape = chips.detect(), (spec.bits.value, spec.replicas, spec.replica_group)
    for limits, how in ((replica_limits(), "as measured here; `mlxquant probe` shows which are "
                         "not"), (lanes.limits(chip), f"by prediction; --for-chip '{chip.label}' "
                                  "looks for groups that are not")):
        free = limits.free(*shape) if limits else None
        if free is False:
            group = f" in groups of {spec.replica_group}" if spec.replica_group else ""
            remark(f"{spec.replicas} replicas{group} are slower than one on this machine, {how}")
        if free is not None:
            return


def _errors(made: "Made") -> str:
    """Lines for the user: the error that this run added, and that of an earlier GGUF import."""
    line = (f"error added on the calibration text: {made.added['mean']:.1e} in the mean of all "
            f"layers, {made.added['largest']:.1e} in {made.added['layer']}")
    if (before := made.inherited) is not None:
        line += (f"\ninherited from importing {before['file']}: {before['error']:.1e} of the "
                 f"weights in {len(before['rounded'])} of {before['tensors']} tensors; "
                 "what the file had lost before is not in it")
    return line


