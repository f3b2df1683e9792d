"""What becomes of a written model: a GGUF file of it, a second look at it, its speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.anatomy import describe_residual
from secateur.checkpoint import Checkpoint, local_path, open_checkpoint
from secateur.checkpoint.lock import locked
from secateur.checkpoint.writer import check_output
from secateur.errors import OutputError, SecateurError, SourceError
from secateur.evaluation import bench as speed
from secateur.modules import MODEL_TYPE_PREFIX, MODELING_FILE
from secateur.outputs import gguf, hf, llama_cpp
from secateur.outputs.hf import PLAN_TENSORS, RECORD, stored_weights
from secateur.outputs.packed import NOTE, repack
from secateur.outputs.verify import Verification, verify_folder, verify_itself
from secateur.outputs.verify_gguf import GgufVerification, verify_gguf
from secateur.plans import BlockCut, Plan
from secateur.progress import Progress
from secateur.rotation.plan import stored_plan
from secateur.scratch import scratch
from secateur.streaming import Stream

if TYPE_CHECKING:
    import torch

FORMATS = ("gguf", "packed", "plain")


@dataclass(frozen=True)
class ExportResult(gguf.Exported):
    """A written file, and what llama.cpp made of it where it could be asked."""

    verification: GgufVerification | None = None


def export(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "gguf",
    weights: str = "f16",
    verify: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write a model, dense or pruned, in the format of another program.

    Args:
        source: folder, GGUF file or hub id.
        out: the file; it gets its name when it is complete.
        to: ``gguf``; ``packed``, a folder whose files shrink by its zeros, which only Secateur
            opens; ``plain``, the same back.
        weights: type of the matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; K-quants with
            llama.cpp's quantiser.
        verify: run the file in llama.cpp, where cyllama is installed, and compare.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    progress = progress or Progress()
    if to not in FORMATS:
        raise OutputError(f"--to is {to!r}: allowed is {', '.join(FORMATS)}")
    place = local_path(out).resolve()
    if to != "gguf":
        return _repack(source, place, to == "packed", trust_remote_code, progress)
    gguf.check_type(weights)
    if place.suffix != ".gguf":
        raise OutputError(f"output {out} must end in .gguf, which other programs know it by")
    check_output(place, local_path(source), file=True)
    stream = Stream(open_checkpoint(source, trust_remote_code=trust_remote_code))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output {out} cannot be written: {error.strerror}") from error
    progress.stage(f"writing {weights} GGUF", len(stream.stored_parameters()))
    with locked(place):
        done = gguf.export(stream, place, kind=weights, step=progress.step)
    progress.finish()
    found = None
    if verify and llama_cpp.available():
        found = verify_gguf(place, stream, against=str(source), progress=progress)
    return ExportResult(done.path, done.architecture, done.bytes, done.notes, found)


def _repack(
    source: str | Path, place: Path, packed: bool, trust_remote_code: bool, progress: Progress
) -> ExportResult:
    check_output(place, local_path(source))
    checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
    name = "packed" if packed else "plain"
    progress.stage(f"writing {name} files", len(checkpoint.files))
    with locked(place):
        before, after = repack(checkpoint, place, packed=packed, step=progress.step)
    progress.finish()
    notes = [f"weights {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now"]
    return ExportResult(place, name, after, notes + [NOTE] * packed)


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verification | GgufVerification:
    """Reopen a written model in a fresh process and compare what it computes.

    Args:
        path: a folder, or a GGUF file.
        against: for a pruned folder its source, whose weights are cut again by the folder's plan;
            for a GGUF file the model that it was exported from. Without it, the fresh process is
            compared with what Secateur reads from the same files.

    Raises:
        VerifyError: it computes something else.
        SecateurError: for everything else that a user can mend.
    """
    progress = progress or Progress()
    checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    other = checkpoint
    if against is not None:
        other = open_checkpoint(against, trust_remote_code=trust_remote_code)
    if local_path(path).suffix == ".gguf":
        name = "the same file read by torch" if against is None else str(against)
        return verify_gguf(
            local_path(path).resolve(),
            Stream(other),
            against=name,
            windows=10,
            length=512,
            progress=progress,
        )
    trust = trust_remote_code or brings_only_our_code(checkpoint)
    stream = Stream(other)
    plan = None if against is None else plan_of(checkpoint, stream)
    progress.stage("reopening in a fresh process", 1)
    if plan is None:
        found = verify_itself(checkpoint.folder, stream, trust_remote_code=trust)
    else:
        found = verify_folder(
            checkpoint.folder, stream, plan, checkpoint.dtype, trust_remote_code=trust
        )
    progress.step()
    progress.finish()
    return found


def brings_only_our_code(checkpoint: Checkpoint) -> bool:
    """Whether transformers may run the code of a pruned folder; stock models need none.

    Raises:
        SourceError: a pruned folder brings other code than Secateur writes.
    """
    if not str(checkpoint.config.model_type).startswith(MODEL_TYPE_PREFIX):
        return False
    if not hf.holds_only_our_code(checkpoint.folder):
        raise SourceError(
            f"{checkpoint.source} brings Python code that is not what this version of Secateur "
            f"writes ({MODELING_FILE}): read it, and if you trust it repeat the command with "
            "--trust-remote-code"
        )
    return True


def plan_of(checkpoint: Checkpoint, source: Stream) -> Plan:
    """The plan that lies in a pruned folder, on the anatomy of its source.

    Raises:
        SourceError: there is none, or it is of another model.
    """
    from safetensors.torch import load_file

    folder = checkpoint.folder
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        rotated = "rotation" in record["plan"]
        tensors = {} if rotated else load_file(folder / PLAN_TENSORS)
        origin = record["source"]["fingerprint"]
        kept = [int(block["source"]) for block in record["plan"]["blocks"]]
        name = str(record["source"].get("name", ""))
    except Exception as error:  # missing, damaged or foreign files, in many ways
        raise SourceError(
            f"{checkpoint.source} has no plan ({RECORD}, {PLAN_TENSORS}) to compare with "
            "--against: leave that out, or name a folder that secateur prune wrote"
        ) from error
    if origin != source.checkpoint.fingerprint:
        raise SourceError(
            f"{checkpoint.source} was not made from {source.checkpoint.source}: give --against "
            f"the model {name} that it was pruned from"
        )
    try:
        if kept != sorted({*kept} & {*range(source.anatomy.layers)}):
            raise ValueError(f"blocks {kept[:100]}")
        return _stored_plan(checkpoint.folder, source, record, tensors, kept)
    except (
        ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError
    ) as error:  # fmt: skip
        raise SourceError(
            f"{checkpoint.source} has a damaged plan in {RECORD} or {PLAN_TENSORS} ({error!r}): "
            "leave --against out, or prune the model again"
        ) from error


def _stored_plan(
    folder: Path,
    source: Stream,
    record: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    kept: list[int],
) -> Plan:
    """The plan of a folder on the anatomy of its source.

    Args:
        tensors: of the plan's file.
        kept: the source's numbers of the blocks that are left.
    """
    if "rotation" in record["plan"]:
        stream = describe_residual(source.model, source.anatomy)
        sliced = stored_plan(source.anatomy, stream, record["plan"], folder)
        sliced.check()
        return sliced
    plan = Plan(source.anatomy, [])
    for number, block in enumerate(kept):
        prefix = f"blocks.{number}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        cut = BlockCut.of(block, own, {})
        new = record["plan"]["blocks"][number].get("new_weights", [])
        if "healed" in record:  # trained on from the scaled weights: the scales are in them
            cut.scales = {k: v for k, v in cut.scales.items() if k not in new}
        cut.weights = stored_weights(folder, plan, number, len(kept), new)
        plan.blocks.append(cut)
    plan.check()
    return plan


def bench(
    sources: Sequence[str | Path],
    *,
    weights: str = "f16",
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    repeats: int = 5,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Speed, bytes and memory of models, measured in turn, in torch and in llama.cpp.

    Args:
        sources: folders, GGUF files or hub ids; the first is what the others are compared with.
        weights: type of the files that are made of all sources for llama.cpp.
        prompt_tokens, new_tokens, repeats, threads: see :mod:`secateur.evaluation.bench`.

    Returns:
        a title and a table for each of the two; the table is empty where it could not be run, and
        the title says why.
    """
    progress = progress or Progress()
    if llama_cpp.available():
        gguf.check_type(weights)
    settings: dict[str, Any] = {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats,
        "threads": threads,
    }  # fmt: skip
    what = f"prompt of {prompt_tokens} tokens, {new_tokens} generated, median of {repeats} turns"
    progress.stage("measuring in torch", 1)
    measured = speed.bench_torch(sources, **settings, trust_remote_code=trust_remote_code)
    progress.step()
    found = [(f"torch, float32: {what}", [speed.HEADER, *speed.table(measured)])]
    try:
        llama_cpp.require("measuring in llama.cpp")
        with scratch() as folder:
            files = _files(sources, folder, weights, trust_remote_code, progress)
            progress.stage("measuring in llama.cpp", 1)
            runs = speed.bench_llama_cpp(files, **settings)
            progress.step()
    except SecateurError as error:
        found.append((f"llama.cpp: {error}", []))
    else:
        found.append((f"llama.cpp: {what}", [speed.HEADER, *speed.table(runs)]))
    progress.finish()
    return found


def _files(
    sources: Sequence[str | Path], folder: Path, weights: str, trust: bool, progress: Progress
) -> list[Path]:
    """A GGUF file of each source of one type, so that only the models differ."""
    files = []
    for number, source in enumerate(sources):
        path = local_path(source)
        stream = Stream(open_checkpoint(source, trust_remote_code=trust))
        progress.stage(f"writing {weights} GGUF of {source}", len(stream.stored_parameters()))
        file = folder / f"{number}-{path.name.removesuffix('.gguf')}-{weights}.gguf"
        gguf.export(stream, file, kind=weights, step=progress.step)
        files.append(file)
    return files
