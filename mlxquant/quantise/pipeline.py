"""From a model folder to a quantised one, block by block.

Only one block is dense in memory at a time. Finished blocks wait in ``OUT.partial``; a killed job
run again with the same settings goes on at the block it was in and ends with the same bytes.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, TooLarge, Unsupported
from mlxquant.base.storage import (
    begun_with,
    holds_output,
    refuse_existing,
    refuse_unfinished,
    working_folder,
)
from mlxquant.base.version import __version__
from mlxquant.layers import outline, repeated
from mlxquant.layers.blocks import Block, release
from mlxquant.layers.siblings import find_siblings
from mlxquant.layers.traffic import leaf_modules
from mlxquant.model.loading import LanguageModel, load, open_tokenizer, vocabulary_of
from mlxquant.model.original import open_original
from mlxquant.quantise import assembly, calibration, card, room, rotation
from mlxquant.quantise.aims import PredictionLoss
from mlxquant.quantise.assignment import assign
from mlxquant.quantise.block_tuning import BlockTuner, summary
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.conversations import converse
from mlxquant.quantise.job import Job, Made, Progress, Text
from mlxquant.quantise.passes import Passes
from mlxquant.quantise.plans import LAYERS, BlockPlan, noted, plan_blocks, plan_ends
from mlxquant.quantise.profile import WEIGHING, current, recording, step
from mlxquant.quantise.rehearsal import rehearse
from mlxquant.quantise.results import BlockResult, Body
from mlxquant.quantise.self_written import self_written
from mlxquant.quantise.sensitivity import check_gradients
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.shelf import shelf
from mlxquant.quantise.sweep import CORRECTION
from mlxquant.quantise.walk import identity
from mlxquant.sources import checkpoint
from mlxquant.sources.checkpoint import KnownFolder
from mlxquant.sources.names import resolve

ONCE = "embedding and head are one matrix, which the file holds twice; the finer is stored, once"


@holds_output
@recording()
def quantize(name: str | PathLike[str], output: str | Path, job: Job | None = None, *,
             revision: str | None = None, progress: Progress = lambda *_: None) -> Made:
    """Quantise the model called ``name`` into the new folder ``output``.

    Without a ``job`` GPTQ makes 4 bits of it, in groups of 64, calibrated on text that the model
    writes itself. Raises ``BadValue`` for a job that the model cannot take, ``TooLarge`` where it
    does not fit, and what ``resolve`` raises.
    """
    job, output = Job() if job is None else job, Path(output)
    checks.kind("job", job, Job)
    name = checks.path("model", name)
    job = job.changed(tune_steps=job.tuning.steps)
    with step("opening"):
        source = KnownFolder(resolve(name, revision=revision))  # as it is before anything is read
        folder = source.folder
        network, config = open_original(folder)
        blocks = assembly.blocks_of(network)
        _check(network, blocks, config, job)
        refuse_existing(output)
    needs = room.check(network, blocks, output, job, outline.attention_heads(config))
    with step("calibration text"), source.reading():
        if not job.calibrated:
            tokens, job = calibration.none(), replace(job, propagation="float")
        else:
            tokens = _text(job, vocabulary_of(network), lambda: open_tokenizer(folder, config),
                           lambda: load(name, revision=revision))
    asked, ends = _identity(folder, job, tokens), job.embedding_bits
    refuse_unfinished(output, {"asked": asked})
    if job.target is not None:
        with step(WEIGHING), source.reading():
            job = assign(source, job, tokens, progress)
    chosen = [f"embedding and head have {job.embedding_bits} bits, with which the model predicts "
              "best in this size"] if job.embedding_bits != ends else []
    tied = config.get("tie_word_embeddings") and not checkpoint.read_config(folder).get(
        "tie_word_embeddings")
    if tied and job.spec.rotation != "fused":
        chosen.insert(0, ONCE)
    base = asdict(card.base_of(name, folder))
    run = Run(source, output, job, tokens, base, asked, needs, chosen)
    return run.make(network, blocks, config, progress)


def _text(job: Job, vocabulary: int, tokenizer: Callable[[], Any],
          opened: Callable[[], LanguageModel]) -> Calibration:
    """The job's calibration tokens. The ``tokenizer`` is opened for text from files, the model
    (``opened``) for text that it is to write."""
    text, opened = job.text, cache(opened)
    # Conversations first, as not every model can hold them. In batches of a fixed size, so that
    # the samples do not depend on the memory.
    talk = converse(opened(), text.conversations, text.length, job.seed,
                    batch=16) if text.conversations else None
    plain = text.samples - text.conversations
    if text.files:
        tokens = calibration.from_files(tokenizer(), list(text.files), plain, text.length,
                                        job.seed, vocabulary=vocabulary)
    else:
        tokens = self_written(opened(), plain, text.length, job.seed)
    return tokens if talk is None else tokens.joined(
        talk, "conversations of the model with itself", job.seed)


def _identity(folder: Path, job: Job, tokens: Calibration) -> str:
    """A digest that is equal for jobs with the same result: it has the text's tokens, no paths."""
    return identity(folder, repr(replace(job, text=Text())), tokens.digest, __version__)


def _check(network: nn.Module, blocks: list[Block], config: dict[str, Any], job: Job) -> None:
    """Refuse what cannot work before any calibration runs."""
    if config["model_type"] == "mlxquant":
        raise Unsupported("the model is already quantised by mlxquant; start from the original")
    if job.spec.rotation == "fused":
        rotation.check(config)
    if job.target is not None:
        check_gradients(network, blocks, config["model_type"])
    repeated.check_repeats(network, job.repeats)
    paths = [block.full(path) for block in blocks for path, module in leaf_modules(block.module)
             if type(module) in LAYERS]
    for glob, _ in job.rules:
        if not any(fnmatchcase(path, glob) for path in paths):
            raise BadValue(f"no layer that can be quantised matches the override {glob!r}; they "
                           f"are called like {paths[0] if paths else 'nothing: there are none'}")


@dataclass
class Run:
    """One job on one model, its ``source``: the calibration ``tokens``, the model's description for
    the card (``base``), the identity of the job before a target was resolved (``asked``), the
    memory and disk it ``needs``, and notes on what was ``chosen`` for it."""

    source: KnownFolder
    output: Path
    job: Job
    tokens: Calibration
    base: dict[str, Any]
    asked: str
    needs: room.Needs = field(default_factory=room.Needs)
    chosen: list[str] = field(default_factory=list)

    @recording()
    def make(self, network: nn.Module, blocks: list[Block], config: dict[str, Any],
             progress: Progress) -> Made:
        """Quantise the blocks of a network whose weights are on disk, and write the result."""
        start, source, job = time.perf_counter(), self.source, self.job
        plans = plan_blocks(network, blocks, job)
        rehearse(network, config, blocks, plans, job)
        ends = plan_ends(network, blocks, job)
        record = job.record(self.tokens, self.base)
        made = _identity(source.folder, replace(job, target=None), self.tokens)
        partial = working_folder(self.output, {"job": made, "asked": self.asked},
                                 record | {"training": self.needs.training})
        source.made, self.needs = partial, self._needs_of(partial)
        profile = current()
        profile.go_on_from(partial / checkpoint.MAKING)
        files = [partial / f"block-{index:04d}.safetensors" for index in range(len(blocks))]
        turn = assembly.turn_of(config, job)
        tuner = self._tuner(plans, turn, progress)
        body = Body()
        with source.reading(), shelf(partial / "hidden", self.needs.waiting > 0) as waiting:
            work = Passes(network, blocks, plans, files, turn,
                          self._settings(network, blocks, tuner is not None), tuner,
                          job.propagation == "float", waiting)
            for done, (index, result) in enumerate(self._results(work), 1):
                body.add(blocks[index], result)
                release(blocks[index].module)
                source.check()
                profile.write(partial / checkpoint.MAKING)
                progress(done, len(blocks), time.perf_counter() - start, "quantising")
            tuned, left = summary(body.tuned)
            record |= {"tuned_blocks": tuned} if tuned else {}
            notes = [*self.chosen, *noted([*plans, ends]), *left]
            with step("writing"):
                config = self._write(work, body, record | ({"notes": notes} if notes else {}))
        shutil.rmtree(partial)
        return Made(self.output, time.perf_counter() - start, profile.peak_memory,
                    body.output_error(), config.get("mlxquant_import"), tuple(notes),
                    profile.as_dict(), tuned)

    def _needs_of(self, partial: Path) -> room.Needs:
        """The job's, with the blocks that were to be trained when it began: by how much memory is
        free now, a resumed job would end with other bytes. Raises ``TooLarge`` where it is less."""
        needs, begun = self.needs, begun_with(partial)["training"]
        if lost := {*needs.untrained} - {*begun["untrained"]} or (
                {*begun["predicting"]} - {*needs.predicting}):
            raise TooLarge(f"{min(lost)} cannot be trained in the memory that is free now, but "
                           f"could when {partial} was begun: free more, or remove that and start "
                           "again")
        return replace(needs, untrained=begun["untrained"], predicting={
            path: needs.predicting[path] for path in begun["predicting"]})

    def _write(self, work: Passes, body: Body, record: dict[str, Any]) -> dict[str, Any]:
        """Write the folder from the blocks' files and what is around them; its config.json."""
        # Opened anew, so that float32 copies of the arrays outside the blocks are not held.
        network, config = open_original(self.source.folder)
        made = assembly.outside(network, config, self.job)
        others, config = made.tensors, assembly.result_config(made, body, self.job, record)

        def tensors() -> Iterator[tuple[str, mx.array]]:
            while others:
                name = next(iter(others))
                yield name, others.pop(name)
            for file in work.files:
                yield from mx.load(str(file)).items()
            self.source.check()

        def finish(folder: Path) -> None:
            current().write(folder / checkpoint.MAKING)
            card.write(folder, self.output.name)

        del made, network
        checkpoint.write(self.output, config, tensors(), checkpoint.side_files(self.source.folder),
                         finish=finish)
        return config

    def _tuner(self, plans: list[BlockPlan], turn: mx.array | None,
               progress: Progress) -> BlockTuner | None:
        """What trains the blocks, where there is text and any is to be trained."""
        job = self.job
        wanted = job.calibrated and any(job.tunes(plan.specs.values()) for plan in plans)
        aims = {path: PredictionLoss(head, turn) for path, head in self.needs.predicting.items()}
        return BlockTuner(job, lambda done, steps, error: progress(
            done, steps, error, "tuning"), self.needs.untrained, aims) if wanted else None

    def _settings(self, network: nn.Module, blocks: list[Block], tuned: bool) -> Settings:
        job = self.job
        return Settings(
            assembly.stored_dtype(blocks[0]),
            CORRECTION if job.propagation == "corrected" else 0.0, job.activation, job.alpha,
            job.seed, {path: group for group in find_siblings(network) for path in group.paths},
            tuned)

    def _results(self, work: Passes) -> Iterator[tuple[int, BlockResult]]:
        if not self.job.calibrated:
            return work.rounded()
        if work.floats and work.tuner is None:
            return work.on_float(self.source.folder, self.tokens)
        return work.on_quantised(self.source.folder, self.tokens)
