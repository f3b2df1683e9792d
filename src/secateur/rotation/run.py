"""A run that cuts the hidden width: from a source and a recipe to a plan, and to a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.anatomy import describe_residual
from secateur.checkpoint.writer import (
    Journal,
    is_whole,
    newest_blocks,
    write_bytes,
    write_json,
)
from secateur.errors import OutputError, RecipeError
from secateur.estimate import Estimate, check_memory, estimate, parse_limit
from secateur.forms import Form, Target
from secateur.layers import LayerChoice
from secateur.methods import get_method
from secateur.methods.rotating import Rotating
from secateur.opening import Opened
from secateur.outputs import hf
from secateur.outputs.card import model_card
from secateur.plans import BlockCut, Plan, Tensors
from secateur.progress import Progress
from secateur.recipe import Recipe, parameters_to_remove
from secateur.rotation.plan import RotationPlan, Slice, StoredBases, write_bases
from secateur.rotation.stages import find_bases
from secateur.rotation.weights import rotate_block, rotate_outside

#: Settings of other kinds of cut, and what they would mean.
FOREIGN = {
    "structure": "what goes inside blocks",
    "layout": "whether blocks have widths of their own",
    "round_to": "multiples of FFN widths",
}
#: Copies of a d x d float64 matrix that exist at once: C, damped, vectors, the solver's work.
SQUARES = 6


class RotationRun(Opened):
    """What ``plan`` and ``prune`` do with a method that rotates."""

    def __init__(
        self,
        source: str | Path,
        recipe: Recipe,
        *,
        device: str,
        max_memory: str | None,
        trust_remote_code: bool,
        progress: Progress,
        target: Target | None = None,
        beside: int = 1,
        spreads: bool = False,
    ) -> None:
        if spreads:
            raise RecipeError(
                f"method {recipe.method} turns the stream of the whole model, block after block, "
                "so blocks cannot be cut side by side: leave out --workers and --cluster"
            )
        if target is not None and target.kind == "gguf":
            raise OutputError(
                f"a GGUF file cannot hold what method {recipe.method} makes: llama.cpp has no "
                "tensor for the shortcut matrices of its residuals; give --out a folder name, or "
                "use another --method"
            )
        if recipe.then is not None:
            raise RecipeError(
                f"--then {recipe.then} makes zeros in whole units that stay, but method "
                f"{recipe.method} cuts the hidden width of the whole model: leave out --then, or "
                "use another --method, such as obs"
            )
        for name, meaning in FOREIGN.items():
            if getattr(recipe, name) != "auto":
                option = f"--{name.replace('_', '-')}"
                raise RecipeError(
                    f"{option} says {meaning}, but method {recipe.method} cuts the hidden width "
                    f"of the whole model: leave out {option}"
                )
        super().__init__(
            source,
            recipe,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
            target=target,
        )
        method = get_method(recipe.method, recipe.options)
        assert isinstance(method, Rotating)
        self.method = method
        anatomy = self.stream.anatomy
        self.residual = describe_residual(self.stream.model, anatomy)
        self.asked = parameters_to_remove(
            recipe,
            parameters=anatomy.parameters,
            decoder=anatomy.decoder_parameters,
            bytes_each=self.dtype.itemsize,
        )
        self.cut = self._width()
        self.memory = parse_limit(max_memory) if max_memory else None
        self.estimate = self._estimate()
        progress.note(self.estimate.text())
        check_memory(self.estimate, max_memory, beside=beside)
        self.windows = self._calibrate()

    def _width(self) -> Slice:
        """The largest width with which at least the parameters that were asked for are gone.

        Raises:
            RecipeError: the smallest one leaves more than that.
        """
        full, step = self.residual.width, self.method.multiple
        if step >= full:
            raise RecipeError(
                f"multiple is {step}, but the hidden width is only {full}: allowed are 1 to "
                f"{full - 1}"
            )
        for kept in range((full - 1) // step * step, 0, -step):
            plan = self._empty_plan(kept)
            if plan.gone >= self.asked:
                return plan.cut
        raise RecipeError(_too_much(plan, self.asked))

    def _empty_plan(self, kept: int) -> RotationPlan:
        last = kept if self.method.slices_head else self.residual.width
        anatomy = self.stream.anatomy
        return RotationPlan(anatomy, [], self.residual, Slice(kept, last), self.recipe.of)

    def _estimate(self) -> Estimate:
        spec, config, anatomy = self.recipe.calibration, self.checkpoint.config, self.stream.anatomy
        width, tokens = self.residual.width, spec.samples * spec.length
        found = estimate(
            anatomy,
            set(),
            windows=spec.samples,
            length=spec.length,
            hidden=width,
            vocabulary=int(config.vocab_size),
            overhead=self.checkpoint.overhead,
            passes=1,
        )
        places = 1 + anatomy.layers * len(self.residual.stages)
        parts = {
            **found.parts,
            "a block and its matrices": found.parts["a block and its matrices"]
            + 8 * SQUARES * width * width
            # Rotated in float64, one linear layer at a time, the results kept until written.
            + 8 * anatomy.block_parameters,
            "block boundaries": 4 * tokens * width * 3,
        }
        # A float64 product takes twice as long; a symmetric eigenproblem about 20 d^3.
        forward = 2 * anatomy.decoder_parameters * tokens
        extra = places * (4 * tokens * width**2 + 2 * 20 * width**3)
        return replace(found, parts=parts, seconds=found.seconds * (1 + extra / forward))

    # ---- the plan, and what is written of it -------------------------------------------------

    def find(self) -> tuple[Plan, LayerChoice, None]:
        """The plan without bases, which only a folder has room for; all blocks stay."""
        plan = self._empty_plan(self.cut.kept)
        find_bases(self.stream, self.method, plan, self.windows.tokens, self.progress)
        return plan, self._choice(), None

    def write(self, journal: Journal) -> tuple[Plan, LayerChoice, None]:
        """All files of the model in the journal's work folder."""
        plan, blocks = self._empty_plan(self.cut.kept), self.stream.anatomy.layers
        # Where the files are: still in the work folder, or under their name already.
        folder = journal.model if any(journal.model.glob("*")) else journal.out
        plan.bases = StoredBases(folder if journal.find("files") else journal.model, blocks)
        done = {
            value["source"]: BlockCut(value["source"], notes=value["notes"])
            for value in newest_blocks(journal)
            if is_whole({folder / name: digest for name, digest in value["sha256"].items()})
        }
        if done:
            self.progress.note(f"continuing: {len(done)} of {blocks} blocks are finished")

        def sink(cut: BlockCut, state: Tensors, bases: list[Any]) -> None:
            number = cut.source
            tensors = rotate_block(state, self.residual, bases, self.dtype)
            of_bases = write_bases(journal.model, number, blocks, bases)
            digest = hf.write_shard(
                journal.model, plan, cut, tensors, number=number, blocks=blocks, dtype=self.dtype
            )
            digests = {hf.shard_name(number, blocks): digest, **of_bases}
            journal.add("block", {"source": number, "sha256": digests, "notes": cut.notes})
            self.check_unchanged(journal)

        if journal.find("files") is None or len(done) < blocks:
            tokens = self.windows.tokens
            find_bases(self.stream, self.method, plan, tokens, self.progress, sink=sink, done=done)
            self._write_rest(journal, plan)
            self.check_unchanged(journal)
            journal.add("files", {})
        else:
            plan.blocks.extend(done[layer] for layer in range(blocks))
        return plan, self._choice(), None

    def _write_rest(self, journal: Journal, plan: RotationPlan) -> None:
        folder, blocks = journal.model, len(plan.blocks)
        self.progress.stage("writing embeddings, config, tokenizer", 1)
        assert plan.bases is not None
        ends = plan.bases.of_block(0)[0], plan.bases.of_block(blocks - 1)[-1]
        outside = rotate_outside(self.stream.read_outside(), self.residual, *ends, self.dtype)
        hf.write_outside(folder, outside, blocks=blocks, dtype=self.dtype)
        del outside
        hf.write_config(folder, self.checkpoint, plan, self.dtype)
        hf.copy_companions(folder, self.checkpoint)
        record = self.record(plan)
        write_json(folder / hf.RECORD, record)
        card = model_card(plan, record, source=self.checkpoint.source, stock=False)
        write_bytes(folder / "README.md", card.encode())
        self.progress.step()
        self.progress.finish()

    def record(self, plan: RotationPlan) -> dict[str, Any]:
        """The content of ``secateur.json``. Nothing here depends on time or place."""
        return {
            **self.provenance(),
            "method_options": self.method.options.model_dump(),
            "asked": {"parameters_removed": self.asked},
            "reached": {"parameters_removed": plan.gone},
            "layer_stage": {"importances": {}, "removed_in_order": [], "trials": []},
            "form": {
                "structure": "rotation",
                "layout": "uniform",
                "round_to": 1,
                "why": "the hidden width is cut, FFNs stay as they were",
            },
            "plan": plan.summary(),
        }

    def _choice(self) -> LayerChoice:
        return LayerChoice(list(range(self.stream.anatomy.layers)), {}, [])

    def result_fields(
        self, plan: Plan, choice: LayerChoice, layout_cost: dict[str, float] | None, peak: int
    ) -> dict[str, Any]:
        return {
            "plan": plan,
            "form": Form(),
            "layout_cost": layout_cost,
            "asked": self.asked,
            "choice": choice,
            "trials": [],
            "bytes_written": plan.sizes().parameters * self.dtype.itemsize,
            "estimate": self.estimate,
            "seconds": dict(self.progress.seconds),
            "peak_memory": peak,
        }


def _too_much(plan: RotationPlan, asked: int) -> str:
    """Why even the smallest width, which ``plan`` has, leaves too many parameters."""
    full, kept = plan.stream.width, plan.cut.kept
    does = f"removes {plan.gone:,}" if plan.gone >= 0 else f"adds {-plan.gone:,}"
    where = " from the decoder blocks" if plan.of == "decoder" else ""
    own = f" and the head, until now the embedding, {plan.own_head:,}" if plan.own_head else ""
    return (
        f"{asked:,} parameters should go{where}, but even the smallest hidden width, {kept} of "
        f"{full}, {does}: the shortcuts of its residuals take {plan.shortcuts:,}{own}; ask for "
        "less, lower multiple with --set, or use another --method"
    )
