"""Verbs that make a model folder: quantize, tune and import.

What a verb needs is imported when it runs, so that the help is quick.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mlxquant.base.errors import BadValue, ModelNotFound
from mlxquant.base.text import clean
from mlxquant.cli import options as option
from mlxquant.cli.common import Advance, app, print_json, print_table, progress, remark

if TYPE_CHECKING:
    from mlxquant.codes.spec import Spec
    from mlxquant.quantise.job import Made

# Titles of the bars of what quantising does, by stage.
_STAGES = {"quantising": "quantising, seconds:", "weighing": "weighing layers, seconds:",
           "tuning": "tuning the block, % error left:"}


@app.command(epilog="Example: mlxquant quantize smollm2-135m -o small --bits 3 --data text.txt")
def quantize(
    model: option.Model, output: option.NewFolder,
    method: Annotated[str, Option(help="rtn, gptq, awq, smoothquant or replica.")] = "gptq",
    bits: Annotated[str, Option(help="1, ternary, 2, 3, 4, 5, 6 or 8.")] = "4",
    group_size: option.GroupSize = 64,
    rotate: Annotated[bool, Option(
        "--rotate", help="Rotate every layer's input by a block Hadamard at run time.")] = False,
    rotate_fused: Annotated[bool, Option(
        "--rotate-fused",
        help="Rotate the residual stream once, merged into the weights.")] = False,
    replicas: Annotated[int, Option(help="replica: how often each code is used, 1 to 16.")] = 4,
    replica_group: Annotated[int, Option(
        help="replica: inputs that share a scaling but for one factor each: 8, 16, 32 or 64; "
             "0: none.")] = 0,
    for_chip: Annotated[str | None, Option(
        help="replica: the chip that is to run it, e.g. 'M1 Pro'; inputs share a scaling in the "
             "smallest group that is predicted to cost no time there.")] = None,
    symmetric: Annotated[bool, Option("--symmetric", help="Levels mirror around zero.")] = False,
    act_order: Annotated[bool, Option(help="GPTQ: most active inputs first.")] = True,
    refine: Annotated[int, Option(help="GPTQ: rounds that move codes and scales once more.")] = 3,
    propagation: Annotated[str, Option(
        help="Calibrate a block on the inputs of the float model, of the quantised one, "
             "or corrected for the difference.")] = "quantised",
    override: Annotated[list[str] | None, Option(
        help="'GLOB:bits=4,group_size=64' for some layers; repeatable.")] = None,
    target_bpw: Annotated[float | None, Option(
        help="Give each layer its own width: bits per weight of the body.")] = None,
    target_gb: Annotated[float | None, Option(
        help="The same, to gigabytes (10^9 bytes) of the whole folder.")] = None,
    siblings_alike: Annotated[bool, Option(
        "--siblings-alike",
        help="With a target, replica: q, k and v get one width, gate and up too; faster, a little "
             "worse.")] = False,
    embedding_bits: Annotated[int | None, Option(
        help="Width of embedding and head; default: as stored.")] = None,
    activation_bits: Annotated[int | None, Option(
        help="Round activations too (simulated), e.g. 8.")] = None,
    activation_granularity: Annotated[str, Option(help="token, tensor or static.")] = "token",
    alpha: Annotated[float | None, Option(
        help="SmoothQuant's strength, 0 to 1; default: searched.")] = None,
    repeat_blocks: Annotated[list[str] | None, Option(
        help="8:16x2 runs each of blocks 8 to 15 twice in a row, on weights stored once; "
             "repeatable. Changes nothing until the result is tuned.")] = None,
    repeat_span: Annotated[list[str] | None, Option(
        help="8:16x2 runs blocks 8 to 15 in turn, and then all of them again; "
             "repeatable.")] = None,
    tune_blocks: Annotated[bool | None, Option(
        "--tune-blocks/--no-tune-blocks", show_default=False,
        help="Train each block's scales and codes until it gives what the original's does; "
             "default: blocks with layers below 4 bits.")] = None,
    tune_steps: Annotated[int | None, Option(
        help="Steps for each block; default: 320 on a GPU, 32 without one.")] = None,
    data: option.Data = None, samples: option.Samples = 128, sequence_length: option.Length = 512,
    seed: option.ByteSeed = 0, revision: option.Revision = None,
    as_json: Annotated[bool, Option(
        "--json", help="Print JSON on stdout: a line when a block is done, and one at the end.",
    )] = False,
) -> None:
    """Quantise a model block by block; a killed run goes on where it was."""
    from mlxquant.codes.spec import Spec, parse_override
    from mlxquant.codes.width import Width
    from mlxquant.layers.repeated import parse_repeat
    from mlxquant.layers.transformed import ActivationSpec
    from mlxquant.model.inspection import gain_line, inspect
    from mlxquant.quantise.job import Job, Target, Text
    from mlxquant.quantise.pipeline import quantize as run
    from mlxquant.quantise.settings import BlockTuning

    if rotate and rotate_fused:
        raise BadValue("--rotate and --rotate-fused are two forms of one thing; give one")
    budget = target_bpw is not None or target_gb is not None
    if siblings_alike and not budget:
        raise BadValue("--siblings-alike is for budgets; give --target-bpw or --target-gb with it")
    repeats = [block for each in repeat_blocks or () for block in parse_repeat(each).one_by_one()]
    repeats += map(parse_repeat, repeat_span or ())
    spec = Spec(Width.of(bits), group_size, symmetric, method, act_order, refine,
                "online" if rotate else "fused" if rotate_fused else None, replicas,
                replica_group or _free_group(for_chip, bits, replicas))
    job = Job(
        spec, rules=tuple(parse_override(each) for each in override or ()),
        text=Text(tuple(data or ()), samples, sequence_length),
        target=Target(target_bpw, target_gb, siblings_alike) if budget else None,
        propagation=propagation, embedding_bits=embedding_bits,
        activation=None if activation_bits is None else (
            ActivationSpec(activation_bits, activation_granularity)),
        alpha=alpha, repeats=tuple(repeats), seed=seed,
        tuning=BlockTuning(tune_blocks, tune_steps))
    if for_chip is None:
        _warn_of_slow_replicas(spec)
    with progress(_STAGES["quantising"]) as advance:
        made = run(model, output, job, revision=revision, progress=_teller(advance, as_json))
    result = inspect(str(output))
    if as_json:
        print_json({"folder": str(output), "bits_per_weight": result.bits_per_weight,
                    "file_bytes": result.file_bytes, "seconds": made.seconds,
                    "peak_memory_gb": made.peak_memory / 1e9, "added_error": made.added,
                    "inherited_error": made.inherited, "tuned_blocks": made.tuned,
                    "notes": made.notes, "profile": made.profile}, indent=None)
        return
    for note in made.notes:
        remark(note)
    print(clean(_errors(made)))
    if made.tuned:
        print(f"tuned: {gain_line(made.tuned)}")
    print(f"{output}: {result.bits_per_weight:.2f} bits per weight of the body, "
          f"{result.file_bytes / 1e6:.1f} MB on disk, {made.seconds:.0f} s, "
          f"peak {made.peak_memory / 1e9:.2f} GB")


def _teller(advance: Advance, as_json: bool) -> Callable[[int, int, float, str], None]:
    """A function of (done, total, value, stage) that moves the bars, and prints a line of JSON for
    each block: the value is a block's seconds, or the error left in one that is tuned."""
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
    """Inputs that are to share a scaling so that replicas take no time on ``chip``: 0 where they
    need not, or no chip was named."""
    if chip is None:
        return 0
    from mlxquant.machine import chips, lanes

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
    from mlxquant.runtime.probe import replica_limits

    limits = replica_limits() if spec.method == "replica" else None
    shape = spec.bits.value, spec.replicas, spec.replica_group
    if limits is not None and limits.free(*shape) is False:
        remark(f"{spec.replicas} replicas in groups of {spec.replica_group or 1} are slower than "
               "one on this machine; `mlxquant probe` shows which are not")


def _errors(made: "Made") -> str:
    """What this run added, and what was lost before it, as far as that can be known."""
    line = (f"error added on the calibration text: {made.added['mean']:.1e} in the mean of all "
            f"layers, {made.added['largest']:.1e} in {made.added['layer']}")
    if (before := made.inherited) is not None:
        line += (f"\ninherited from importing {before['file']}: {before['error']:.1e} of the "
                 f"weights in {len(before['rounded'])} of {before['tensors']} tensors; "
                 "what the file had lost before is not in it")
    return line


@app.command(epilog="Example: mlxquant tune small -o tuned --teacher smollm2-135m "
                    "--data text.txt --steps 300")
def tune(
    model: Annotated[str, Argument(metavar="DIR", help="A folder that quantize made.")],
    output: option.NewFolder,
    teacher: Annotated[str, Option(
        help="The original: a folder, a .gguf file, a repository, a recipe.")],
    data: Annotated[list[str], Option(
        help="Text to train on: a file or hf://datasets/OWNER/NAME/FILE; repeatable.")],
    steps: Annotated[int, Option(help="Training steps.")] = 1000,
    batch_size: Annotated[int, Option(help="Sequences in a step.")] = 8,
    sequence_length: Annotated[int, Option(help="Tokens in a sequence.")] = 512,
    learning_rate: Annotated[float, Option(help="Relative to the size of what is trained.")] = 2e-3,
    norms: Annotated[bool, Option(help="Train the norms' weights too.")] = True,
    codes: Annotated[float, Option(
        help="Let codes move: how many levels chance alone would carry one; 0: they stay. "
             "0.2 serves well, in runs short and long; it takes 20 bytes of memory more for each "
             "weight.")] = 0.0,
    written: Annotated[int, Option(
        help="Windows in which the teacher goes on from what the texts begin; for runs that see "
             "the texts many times.")] = 0,
    conversations: Annotated[int, Option(
        help="Windows of talk that the teacher writes with itself, beside the texts; keeps a chat "
             "model talking.")] = 0,
    check_every: Annotated[int, Option(
        help="Steps between tries on held-out text; state is saved there.")] = 100,
    seed: Annotated[int, Option(help="The same seed gives the same order of texts.")] = 0,
    as_json: option.AsJson = False,
) -> None:
    """Train a quantised model's scales, and repeated blocks' gates, on the original's predictions.

    A killed run goes on where it was. The result is never worse on held-out text than DIR.
    """
    from mlxquant.tuning.settings import Schedule, Tuning
    from mlxquant.tuning.tune import tune as run

    schedule = Schedule(steps, batch_size, learning_rate, check_every)
    tuning = Tuning(teacher, data, schedule, sequence_length, norms=norms, codes=codes,
                    written=written, conversations=conversations, seed=seed)
    with progress("tuning, divergence in nats:") as advance:
        result = run(
            model, output, tuning, progress=advance,
            writing=lambda done, total, kind: advance(
                done, total, None, f"{kind} by the teacher, windows:"))
    if as_json:
        print_json({"folder": str(output), "divergence_before": result.divergence_before,
                    "divergence_after": result.divergence_after, "seconds": result.seconds,
                    "peak_memory_gb": result.peak_memory / 1e9})
        return
    print(f"{output}: divergence on held-out text {result.divergence_before:.4f} → "
          f"{result.divergence_after:.4f} nats per token, {result.seconds:.0f} s, "
          f"peak {result.peak_memory / 1e9:.2f} GB")


@app.command("import", epilog="Example: mlxquant import model-Q4_K_M.gguf -o model")
def import_gguf(
    file: Annotated[Path, Argument(
        metavar="FILE", help="A .gguf file, or any part of a split one.")],
    output: option.NewFolder,
    bits: Annotated[int | None, Option(
        help="Width of types that MLX has no exact place for: 2, 3, 4, 5, 6, 8, or 16 to keep "
             "them as numbers. Default: the narrowest that holds their bits per weight.")] = None,
    as_json: option.AsJson = False,
) -> None:
    """Make a folder that mlx-lm can load of a GGUF file, and say what that rounded."""
    from mlxquant.sources.gguf import import_file

    if not file.is_file():
        raise ModelNotFound(f"no such file: {file}")
    with progress("importing, GB:") as advance:
        outcome = import_file(file, output, bits, advance)
    record, speed = outcome.record, outcome.bytes / outcome.seconds / 1e9
    if as_json:
        print_json({"folder": str(output), "bytes": outcome.bytes, "seconds": outcome.seconds,
                    "gb_per_s": speed, **record})
        return
    if rounded := record["rounded"]:
        print_table([["layer", "type", "stored as", "error"], *(
            [path, r["type"], "same codes, scales in float16" if r["repacked"]
             else f"{r['bits']} bits, groups of 32", f"{r['error']:.1e}"]
            for path, r in rounded.items() if r["bits"] != 16)], left=(0, 1, 2))  # 16: norms
    others = f", the others within a relative error of {record['error']:.1e}" if rounded else ""
    print(f"{output}: {record['tensors'] - len(rounded)} of {record['tensors']} tensors exact"
          f"{others}; {outcome.bytes / 1e9:.2f} GB in {outcome.seconds:.1f} s, {speed:.2f} GB/s")
