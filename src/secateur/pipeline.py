"""From a source and a recipe to a plan. What is written of it, :mod:`secateur.pruning` writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.anatomy import Anatomy
from secateur.engine import Engine
from secateur.errors import RecipeError
from secateur.estimate import (
    Estimate,
    check_memory,
    check_workers,
    estimate,
    parse_limit,
    work_of,
)
from secateur.executors import Executor
from secateur.fit_text import text_work
from secateur.forms import Form, Target, resolve
from secateur.layers import LayerChoice
from secateur.methods import Method, get_method, method_class
from secateur.methods.chain import Chain
from secateur.methods.rotating import Rotating
from secateur.methods.sparse import SparseMethod
from secateur.opening import Opened
from secateur.outputs import gguf, hf
from secateur.plans import Plan
from secateur.progress import PeakMemory, Progress
from secateur.recipe import Recipe, parameters_to_remove
from secateur.replaying import kept_bytes
from secateur.rotation.run import RotationRun


@dataclass(frozen=True)
class PlanResult:
    """A plan and what led to it.

    Attributes:
        plan: what stays.
        asked: parameters that were to go.
        form: what could be cut, and in which widths.
        layout_cost: with uniform widths, the held-out loss of both layouts; of ``uniform`` alone
            where blocks with widths of their own could not lose as much.
        choice: the layer stage's outcome.
        trials: held-out loss by number of removed blocks, where that was chosen.
        bytes_written: of the weights in the output's type.
        estimate: of memory and time, made before the start.
        seconds, peak_memory: what it took, in seconds by stage and bytes.
    """

    plan: Plan
    asked: int
    form: Form
    layout_cost: dict[str, float] | None
    choice: LayerChoice
    trials: list[dict[str, float]]
    bytes_written: int
    estimate: Estimate
    seconds: dict[str, float]
    peak_memory: int


class Prepared(Opened):
    """A source, a method that fits it, and the engine that applies it."""

    def __init__(
        self,
        source: str | Path,
        recipe: Recipe,
        *,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
        target: Target | None = None,
    ) -> None:
        super().__init__(
            source,
            recipe,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
            target=target,
        )
        self.form = self._form()
        self.method = self._method(self.form)
        if self.target.kind == "gguf":
            method = self.method
            whole = method.ranking is None or recipe.options.get("layers", "auto") == 0
            uniform = self.form.uniform or not method.cuts_inside
            gguf.check_model(self.stream, uniform=uniform, all_blocks=whole)
        anatomy, method = self.stream.anatomy, self.method
        method.check(anatomy)
        if isinstance(method, SparseMethod):
            self.asked = round(method.pattern.share * method.weights(anatomy)) * anatomy.layers
        else:
            self.asked = parameters_to_remove(
                recipe,
                parameters=anatomy.parameters,
                decoder=anatomy.decoder_parameters,
                bytes_each=self.dtype.itemsize,
            )
        self.engine = Engine(
            self.stream,
            self.method,
            to_remove=self.asked,
            seed=recipe.seed,
            dtype=self.dtype,
            progress=progress,
        )

    def _method(self, form: Form) -> Method:
        """The recipe's method for models of this form, with what comes after it."""
        recipe = self.recipe
        method = get_method(recipe.method, recipe.options, form)
        assert isinstance(method, Method)
        if recipe.then is None:
            return method
        zeros = get_method(recipe.then, recipe.then_options, form)
        assert isinstance(zeros, SparseMethod)
        return Chain(method, zeros)

    def _form(self) -> Form:
        anatomy = self.stream.anatomy
        return resolve(
            self.recipe,
            anatomy,
            self.target,
            tied=bool(self.checkpoint.config.tie_word_embeddings),
            stock_groups=hf.stock_groups(self.checkpoint, anatomy),
        )


class Run(Prepared):
    """What ``plan`` and ``prune`` share: everything up to the neuron stage.

    Args:
        max_memory: what all processes together may use, such as ``4GB``.
        beside: runs like this one that share it.
        spreads: whether blocks shall be cut side by side; see :meth:`spread_over`.
    """

    executor: Executor | None = None

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
        super().__init__(
            source,
            recipe,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
            target=target,
        )
        self.trust_remote_code = trust_remote_code
        if spreads:
            check_independent(self.method, self.stream.anatomy)
        self.max_memory = max_memory
        self.memory = parse_limit(max_memory) if max_memory else None
        self.estimate = self._estimate()
        for line in (*self.method.notes(self.stream.anatomy), self.estimate.text()):
            progress.note(line)
        check_memory(self.estimate, max_memory, beside=beside)
        self.windows = self._calibrate()

    def spread_over(self, executor: Executor) -> None:
        """Let blocks be cut there.

        Raises:
            MemoryLimitError: so many workers are more than fits.
        """
        self.executor = executor
        workers = executor.on_one_machine
        self.progress.note(
            f"{executor.workers} workers of {_counted(executor.threads, 'thread')}: up to "
            f"{self.estimate.worker / 2**20:.0f} MiB each, with this process "
            f"{self.estimate.with_workers(workers) / 2**20:.0f} MiB"
            + (f" on each of {executor.machines} machines" if executor.machines > 1 else "")
        )
        check_workers(self.estimate, self.max_memory, workers, executor.machines)

    def _estimate(self) -> Estimate:
        spec, config = self.recipe.calibration, self.checkpoint.config
        anatomy = self.stream.anatomy
        text = text_work(self.method, anatomy, spec.samples, spec.length)
        tokens = text.windows * spec.length
        survey = self.method.survey_by(anatomy, spec.samples * spec.length)
        work = work_of(self.method, anatomy, self.engine.layer_counts(), tokens, survey)
        return estimate(
            anatomy,
            self.method.signals(anatomy) if self.method.needs == "moments" else set(),
            windows=text.windows,
            length=spec.length,
            hidden=int(config.hidden_size),
            vocabulary=int(config.vocab_size),
            overhead=self.checkpoint.overhead,
            gradients=self.method.gradients_held if survey == "gradients" else 0,
            passes=work.passes + text.passes,
            heads=work.heads + text.heads,
            solving=work.cuts * anatomy.layers * self.method.solving(anatomy, tokens),
            solver=self.method.solver_bytes(anatomy, tokens),
            kept=kept_bytes(self.method, anatomy, tokens) + self.method.held(anatomy, tokens),
            whole=bool(self.method.written(anatomy, spec.samples, spec.length)),
            waits=not self.method.stages(anatomy),
        )

    def layout_cost(self, choice: LayerChoice) -> dict[str, float] | None:
        """Loss on held-out windows with widths of each block's own, and with one for all.

        None where the layout is not uniform, or shapes inside blocks stay: then nothing has been
        given up.
        """
        if not self.form.uniform or not self.method.cuts_inside or self.method.makes_zeros:
            return None
        free = self._method(replace(self.form, layout="per-layer", groups=None))
        losses = {}
        for layout, method in (("per-layer", free), ("uniform", self.method)):
            engine = Engine(
                self.stream,
                method,
                to_remove=self.asked,
                seed=self.recipe.seed,
                dtype=self.dtype,
                progress=self.progress,
            )
            try:
                losses[layout] = round(engine.held_out_loss(choice, self.windows.tokens), 6)
            except RecipeError:
                # Blocks that only the other layout exempts leave too little: nothing to compare.
                if method is self.method:
                    raise
        return losses

    def record(
        self,
        plan: Plan,
        choice: LayerChoice,
        trials: list[dict[str, float]],
        layout_cost: dict[str, float] | None,
    ) -> Any:
        """The content of ``secateur.json``. Nothing here depends on time or place."""
        return {
            **self.provenance(),
            "method_options": self.method.options.model_dump(),
            "asked": (
                {"parameters_removed": 0, "zeros": self.asked}
                if self.method.makes_zeros
                else {"parameters_removed": self.asked}
            ),
            "reached": {
                "parameters_removed": plan.gone,
                **({"zeros": plan.zeros} if self.recipe.sparsity else {}),
            },
            "layer_stage": {
                "importances": {str(k): round(v, 6) for k, v in choice.importances.items()},
                "removed_in_order": choice.removed,
                "trials": trials,
            },
            "form": {
                "structure": self.form.structure,
                "layout": self.form.layout,
                "round_to": self.form.multiple,
                "why": self.form.reason,
                **({"held_out_loss": layout_cost} if layout_cost else {}),
            },
            "plan": plan.summary(),
        }

    def find(self) -> tuple[Plan, LayerChoice, dict[str, float] | None]:
        """The plan, the blocks that were chosen for it, and what one width for all costs."""
        choice = self.engine.choose_layers(self.windows.tokens)
        cost = self.layout_cost(choice)
        shares = self.engine.shares(choice, self.windows.tokens)
        return self.engine.neuron_stage(choice.layers, shares, self.windows.tokens), choice, cost

    def result_fields(
        self, plan: Plan, choice: LayerChoice, layout_cost: dict[str, float] | None, peak: int
    ) -> dict[str, Any]:
        return {
            "plan": plan,
            "form": self.form,
            "layout_cost": layout_cost,
            "asked": self.asked,
            "choice": choice,
            "trials": self.engine.trials,
            "bytes_written": plan.sizes().parameters * self.dtype.itemsize,
            "estimate": self.estimate,
            "seconds": dict(self.progress.seconds),
            "peak_memory": peak,
        }


def check_independent(method: Method, anatomy: Anatomy) -> None:
    """Whether the blocks of this method can be cut side by side.

    Raises:
        RecipeError: each needs those before it.
    """
    if method.identical_inputs or not method.signals(anatomy):
        return
    ways = "leave out --workers and --cluster"
    if "inputs" in type(method.options).model_fields and not isinstance(method, Chain):
        ways = f"add --set inputs=identical, or {ways}"
    raise RecipeError(
        f"method {method.name} takes the statistics of each block behind the cut blocks before it, "
        f"so blocks cannot be cut side by side: {ways}"
    )


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def open_run(source: str | Path, recipe: Recipe, **settings: Any) -> Run | RotationRun:
    """The run that this recipe's method takes; see :class:`Run` for the settings.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    kind = RotationRun if issubclass(method_class(recipe.method), Rotating) else Run
    return kind(source, recipe, **settings)


def make_plan(
    source: str | Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    max_memory: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PlanResult:
    """Find out what would go, without writing a model.

    Args:
        source: folder, GGUF file or hub id.
        recipe: what is asked.
        device: where blocks run: ``cpu``, ``cuda``, ``cuda:1``.
        max_memory: refuse to start when the estimate is above this, such as ``4GB``.
        trust_remote_code: run Python code of the checkpoint.
        progress: shows the work; nothing by default.

    Raises:
        SecateurError: for everything that a user can mend.
    """
    with PeakMemory() as memory:
        run = open_run(
            source,
            recipe,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            progress=progress or Progress(),
        )
        plan, choice, cost = run.find()
    return PlanResult(**run.result_fields(plan, choice, cost, memory.peak))


__all__ = ["PlanResult", "make_plan"]
