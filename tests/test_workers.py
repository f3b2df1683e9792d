"""Blocks that are cut side by side: the same bytes, deaths, and what is refused.

Most of it by workers in threads of this process, which answer as the real ones do; the last tests
have real processes, which take seconds to start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
from commands import secateur
from folders import bytes_of

from secateur import executors, pruning
from secateur.block_worker import BlockWorker
from secateur.errors import MemoryLimitError, OutputError, RecipeError, WorkerDied
from secateur.estimate import Estimate, check_memory, check_workers
from secateur.executors import Executor, Pool, on_ray, opened_executor
from secateur.methods import Share
from secateur.progress import Progress
from secateur.pruning import prune
from secateur.recipe import Recipe, make_recipe
from secateur.spreading import Quotas

SMALL = {"samples": 3, "length": 16}
NONE_EXEMPT = {"exempt_first": 0, "exempt_last": 0}
COMP: dict[str, Any] = {
    "method": "comp",
    "remove": "30%",
    "of": "decoder",
    "options": {"layers": 1, **NONE_EXEMPT},
    "calibration": SMALL,
}
AUTO = {**NONE_EXEMPT, "layers": "auto", "max_layers": 1}
#: Of every way in which blocks come to their shares and statistics, one.
CASES: dict[str, dict[str, Any]] = {
    "comp": COMP,  # a block's miss goes on to the next
    "comp-exempt": {**COMP, "remove": "15%", "options": {"layers": 0, "exempt_first": 2}},
    "comp-inputs": {**COMP, "structure": "inputs", "options": AUTO},
    "comp-random": {**COMP, "options": {**COMP["options"], "order": "random"}},
    "obs": {
        **COMP,
        "method": "obs",
        "options": {**COMP["options"], "inputs": "identical", "copies": 1, "written": 0},
    },
    "obs by gradients": {  # scores of units from a survey
        **COMP,
        "method": "obs",
        "options": {
            **COMP["options"],
            "inputs": "identical",
            "copies": 0,
            "written": 0,
            "gradients": 0.5,
        },
    },
    "flap": {**COMP, "method": "flap", "options": {}},  # a survey; channels; biases
    "llm-pruner": {
        **COMP,
        "method": "llm-pruner",
        "options": NONE_EXEMPT,
    },  # by gradients; units named
    "magnitude-sp": {**COMP, "method": "magnitude-sp", "options": {}},  # nothing is run
    "shortgpt": {**COMP, "method": "shortgpt", "options": {"compensate": True}},  # nothing is cut
    "magnitude": {"method": "magnitude", "sparsity": "50%", "calibration": SMALL},
}


class InThread:
    """A worker that is none: the same code, and values as they come through JSON."""

    def __init__(self, deaths: list[tuple[str, int]]) -> None:
        self.worker = BlockWorker()
        self.deaths = deaths
        self.layer = -1

    def ask(self, task: str, told: Any = None, **arguments: Any) -> Any:
        arguments = json.loads(json.dumps(arguments))
        self.layer = arguments.get("layer", self.layer)
        if (task, self.layer) in self.deaths:
            self.deaths.remove((task, self.layer))
            raise WorkerDied("a worker ended with SIGKILL: out of memory, or killed by somebody")
        return json.loads(json.dumps(getattr(self.worker, task)(**arguments)))

    def close(self) -> None:
        self.worker.end()


class Threads(Executor):
    """Workers in threads; dies at the steps that are named, once each."""

    workers = 2
    threads = 1

    def __init__(self) -> None:
        super().__init__()
        self.deaths: list[tuple[str, int]] = []
        self.started = 0

    def _start(self, module: str, what: str) -> InThread:
        assert module == "secateur.block_worker"
        self.started += 1
        return InThread(self.deaths)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    """What ``--workers 2`` uses in this test."""
    made = Threads()

    @contextmanager
    def opened(workers: int | None, cluster: str | None) -> Iterator[Executor | None]:
        yield made if workers == 2 else None

    monkeypatch.setattr(pruning, "opened_executor", opened)
    return made


@pytest.fixture(scope="module")
def serial(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, bytes]]:
    """What one process writes, made once a case."""
    known: dict[str, dict[str, bytes]] = {}
    root = tmp_path_factory.mktemp("serial")

    def files(case: str, model: str = "llama-gqa-tied") -> dict[str, bytes]:
        name = f"{case}-{model}"
        if name not in known:
            prune(model_folder(model), root / name, recipe(case), verify=False)
            known[name] = bytes_of(root / name)
        return known[name]

    return files


def recipe(case: str) -> Recipe:
    return make_recipe(**CASES[case])


# ---- the same bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_same_bytes(
    case: str, threads: Threads, serial: Any, model_folder: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune(model_folder("llama-gqa-tied"), out, recipe(case), verify=False, workers=2)
    assert threads.started == 2
    assert bytes_of(out) == serial(case)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("model", ["mistral", "opt", "llama-biases"])
def test_same_bytes_of_other_families(
    model: str, threads: Threads, serial: Any, model_folder: Any, tmp_path: Path
) -> None:
    prune(model_folder(model), tmp_path / "out", recipe("comp"), verify=False, workers=2)
    assert bytes_of(tmp_path / "out") == serial("comp", model)


def test_shares_depend_on_each_other_in_the_first_case(serial: Any) -> None:
    """Else nothing above would notice that a miss is not handed on."""
    record = json.loads(serial("comp")["secateur.json"])
    shares = [block["share_removed"] for block in record["plan"]["blocks"]]
    assert len(set(shares)) > 1
    assert record["form"]["structure"] == "coupled"


def test_killed_and_continued_by_one_process(
    threads: Threads,
    serial: Any,
    model_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished blocks of a run with workers are blocks like all others."""
    out, source = tmp_path / "out", model_folder("llama-gqa-tied")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning.Run, "check_unchanged", killed)  # behind the first block's line
        with pytest.raises(KeyboardInterrupt):
            prune(source, out, recipe("comp"), verify=False, workers=2)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    kinds = [json.loads(line)["kind"] for line in journal.read_text().splitlines()]
    assert kinds == ["identity", "layers", "block"]
    prune(source, out, recipe("comp"), verify=False)
    assert bytes_of(out) == serial("comp")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- deaths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["look", "cut", "write"])
def test_a_block_whose_worker_dies_is_done_again(
    task: str, threads: Threads, serial: Any, model_folder: Any, tmp_path: Path
) -> None:
    layers = json.loads(serial("comp")["config.json"])["num_hidden_layers"]
    assert layers == 3
    threads.deaths = [(task, layer) for layer in range(4)] + [(task, 0)]
    out = tmp_path / "out"
    prune(model_folder("llama-gqa-tied"), out, recipe("comp"), verify=False, workers=2)
    assert threads.started >= 5
    assert bytes_of(out) == serial("comp")


def test_a_block_at_which_workers_keep_dying_is_given_up(
    threads: Threads, serial: Any, model_folder: Any, tmp_path: Path
) -> None:
    first = json.loads(serial("comp")["secateur.json"])["plan"]["blocks"][0]["source"]
    threads.deaths = [("write", first)] * 3
    out, source = tmp_path / "out", model_folder("llama-gqa-tied")
    with pytest.raises(OutputError) as raised:
        prune(source, out, recipe("comp"), verify=False, workers=2)
    assert str(raised.value) == (
        f"3 workers died at block {first}, the last one so: a worker ended with SIGKILL: out of "
        "memory, or killed by somebody; finished blocks are kept: repeat the command, with fewer "
        "--workers if memory is short"
    )
    assert not out.exists()


def test_a_worker_s_error_is_the_run_s(
    threads: Threads, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        InThread, "ask", lambda *_, **__: {"source": "another", "versions": {}, "threads": 1}
    )
    with pytest.raises(pruning.SecateurError) as raised:
        prune(
            model_folder("llama-gqa-tied"),
            tmp_path / "out",
            recipe("comp"),
            verify=False,
            workers=2,
        )
    assert str(raised.value) == (
        "a worker finds another model at the path of the source than this process: let all nodes "
        "see the same checkpoint"
    )
    assert list(tmp_path.iterdir()) == []  # nothing that would be in the way


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"method": "obs", "remove": "20%"},
            "method obs takes the statistics of each block behind the cut blocks before it, so "
            "blocks cannot be cut side by side: add --set inputs=identical, or leave out --workers "
            "and --cluster",
        ),
        (
            {"method": "wanda", "sparsity": "50%"},
            "method wanda takes the statistics of each block behind the cut blocks before it, so "
            "blocks cannot be cut side by side: leave out --workers and --cluster",
        ),
        (
            {"method": "comp", "remove": "20%", "then": "magnitude", "sparsity": "50%"},
            "method comp takes the statistics of each block behind the cut blocks before it, so "
            "blocks cannot be cut side by side: leave out --workers and --cluster",
        ),
        (
            {"method": "slicegpt", "remove": "20%"},
            "method slicegpt turns the stream of the whole model, block after block, so blocks "
            "cannot be cut side by side: leave out --workers and --cluster",
        ),
    ],
)
def test_methods_whose_blocks_depend_on_each_other(
    fields: dict[str, Any], text: str, model_folder: Any, tmp_path: Path
) -> None:
    wish = make_recipe(**fields, calibration=SMALL)
    with pytest.raises(RecipeError) as raised:
        prune(model_folder("llama-mha-untied"), tmp_path / "out", wish, workers=2)
    assert str(raised.value) == text
    assert list(tmp_path.iterdir()) == []


def test_options_that_cannot_be_meant(model_folder: Any, tmp_path: Path) -> None:
    words = ["prune", model_folder("llama-gqa-tied"), "--remove", "20%", "--out", tmp_path / "out"]
    secateur(*words, "--cluster", "dask").refused_at_once(
        "--cluster is 'dask': allowed are ray, and ray://HOST:PORT for one that runs"
    )
    secateur(*words, "--cluster", "ray://head").refused_at_once(
        "--cluster is 'ray://head': allowed are ray, and ray://HOST:PORT for one that runs"
    )
    with pytest.raises(RecipeError, match=r"^--workers is 0: allowed are numbers from 1 on$"):
        prune(words[1], tmp_path / "out", recipe("comp"), workers=0)


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError) as raised, opened_executor(2, "ray"):
        pass
    assert str(raised.value) == (
        "--cluster ray needs the package ray: pip install 'secateur[cluster]'"
    )


MIB = 2**20
ESTIMATE = Estimate({"program": 300 * MIB, "block boundaries": 100 * MIB}, 1.0)


def test_memory_is_counted_by_worker() -> None:
    assert ESTIMATE.worker == 300 * MIB
    assert ESTIMATE.with_workers(3) == 1300 * MIB
    check_workers(ESTIMATE, "1300MiB", 3)
    check_workers(ESTIMATE, None, 30)
    with pytest.raises(MemoryLimitError) as raised:
        check_workers(ESTIMATE, "1299MiB", 3)
    assert str(raised.value) == (
        "the run is estimated at 400 MiB and 300 MiB in each of 3 workers, 1300 MiB together, "
        "--max-memory allows 1299 MiB, which is enough for 2: use --workers 2, or raise "
        "--max-memory"
    )
    with pytest.raises(MemoryLimitError, match="is enough for 2: use --workers 8, or raise"):
        check_workers(ESTIMATE, "1GiB", 3, machines=4)
    with pytest.raises(MemoryLimitError, match="is enough for 1: leave out --workers, or raise"):
        check_workers(ESTIMATE, "700MiB", 2)


def test_cells_side_by_side_share_the_limit() -> None:
    check_memory(ESTIMATE, "1200MiB", beside=3)
    with pytest.raises(MemoryLimitError) as raised:
        check_memory(ESTIMATE, "1199MiB", beside=3)
    assert str(raised.value) == (
        "the run is estimated at 400 MiB, 3 of them side by side at 1200 MiB, --max-memory allows "
        "1199 MiB: use --workers 2, or raise --max-memory"
    )


def test_workers_that_do_not_fit_are_refused_before_any_work(
    threads: Threads, model_folder: Any, tmp_path: Path
) -> None:
    with pytest.raises(MemoryLimitError, match="in each of 2 workers"):
        prune(
            model_folder("llama-gqa-tied"),
            tmp_path / "out",
            recipe("comp"),
            workers=2,
            max_memory="700MiB",
        )
    assert threads.started == 0
    assert list(tmp_path.iterdir()) == []


# ---- the parts ---------------------------------------------------------------------------------


def test_quotas_wait_for_what_was_missed() -> None:
    """100 each, of which the blocks in this order lose 90, 130 and 100; block 3 takes no part."""
    shares = {layer: Share(100) for layer in (1, 2, 5)} | {3: Share(0)}
    quotas = Quotas(shares, [1, 2, 3, 5], carries=True)
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(quotas.of(5)))
    waiting.start()
    assert quotas.of(1) == 100
    quotas.lost(1, 90)
    assert quotas.of(2) == 110
    assert found == []
    quotas.lost(2, 130)
    waiting.join(timeout=60)
    assert found == [80]
    assert quotas.of(3) == 0


def test_quotas_that_do_not_depend_on_each_other() -> None:
    quotas = Quotas({1: Share(100), 2: Share(70)}, [1, 2], carries=False)
    assert (quotas.of(2), quotas.of(1)) == (70, 100)


def test_quotas_let_go_at_the_end() -> None:
    quotas = Quotas({1: Share(100), 2: Share(70)}, [1, 2], carries=True)
    threading.Timer(0.05, quotas.end).start()
    with pytest.raises(WorkerDied, match="the run has ended"):
        quotas.of(2)


def test_a_pool_hands_results_to_its_owner() -> None:
    with Pool(2, lambda job: job * job) as pool:
        for job in range(20):
            pool.give(job)
        assert sorted(pool.rest()) == [(job, job * job) for job in range(20)]
        assert list(pool.ready()) == []


def test_a_pool_raises_in_its_owner_s_thread_and_ends() -> None:
    ended: list[bool] = []
    with Pool(2, lambda job: 1 // job, end=lambda: ended.append(True)) as pool:
        pool.give(0)
        with pytest.raises(ZeroDivisionError):
            list(pool.rest())
        assert ended == []
    assert ended == [True]


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    with opened_executor(3, None) as executor:
        assert executor is not None
        assert (executor.workers, executor.threads) == (3, max(1, before // 3))
        assert torch.get_num_threads() == executor.threads
    assert torch.get_num_threads() == before
    with opened_executor(1, None) as nothing:
        assert nothing is None
    assert executors.base.shared_out(16, 3) == 5


# ---- on Ray, without one -----------------------------------------------------------------------


class NoRay:
    """As much of Ray as is used, in this process: an answer is there as soon as it is asked for."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, *, failures: int = 0, nodes: int = 1, cores: int = 2) -> None:
        self.failures = failures
        self.starts: list[dict[str, Any]] = []
        self.ended = 0
        self._nodes, self._cores = nodes, cores

    def init(self, **settings: Any) -> None:
        self.starts.append(settings)
        if len(self.starts) <= self.failures:
            raise ConnectionError("nobody there.\nAnd more.")

    def is_initialized(self) -> bool:
        return False

    def shutdown(self) -> None:
        self.ended += 1

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}] * self._nodes + [{"Alive": False}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._cores)}

    def remote(self, kind: Any) -> Any:
        def start(*arguments: Any) -> Any:
            held = kind(*arguments)
            return SimpleNamespace(
                **{name: SimpleNamespace(remote=getattr(held, name)) for name in ("ask", "news")}
            )

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return answers, []

    def get(self, answer: Any) -> Any:
        return answer

    def kill(self, actor: Any, no_restart: bool) -> None:
        pass


def no_ray(monkeypatch: pytest.MonkeyPatch, **settings: int) -> NoRay:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = NoRay(**settings)
    monkeypatch.setitem(sys.modules, "ray", made)  # type: ignore[arg-type]
    return made


def test_actors_make_the_same_bytes(
    serial: Any, model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, deaths = no_ray(monkeypatch, failures=2), [("cut", 0), ("write", 1)]
    monkeypatch.setattr(on_ray, "Worker", lambda *_: InThread(deaths))
    wish, source = recipe("comp-exempt"), model_folder("llama-gqa-tied")
    prune(source, tmp_path / "out", wish, verify=False, workers=2, cluster="ray")
    assert deaths == []
    assert bytes_of(tmp_path / "out") == serial("comp-exempt")
    assert len(ray.starts) == 3  # two of which came to nothing
    assert not Path(ray.starts[-1]["_temp_dir"]).exists()


def test_a_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ray(monkeypatch, failures=3)
    with pytest.raises(OutputError) as raised, opened_executor(2, "ray"):
        pass
    assert str(raised.value) == (
        "Ray does not start on this machine: nobody there. Try again when less goes on here, or "
        "use --workers without --cluster"
    )


def test_a_ray_that_runs_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = no_ray(monkeypatch, nodes=3, cores=12)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with opened_executor(None, "ray") as executor:
        assert executor is not None
        assert (executor.workers, executor.machines, executor.on_one_machine) == (3, 3, 1)
    with opened_executor(5, "ray://other:10001") as executor:
        assert executor is not None
        assert (executor.workers, executor.on_one_machine) == (5, 2)
        assert executor.threads <= 2
    assert [start["address"] for start in ray.starts] == ["head:6379", "ray://other:10001"]
    with pytest.raises(RecipeError) as raised, opened_executor(13, "ray"):
        pass
    assert str(raised.value) == (
        "--workers 13 are more than the 12 CPUs of this Ray: use --workers 12"
    )


def test_a_ray_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    no_ray(monkeypatch, failures=1)
    with pytest.raises(OutputError) as raised, opened_executor(2, "ray://head:10001"):
        pass
    assert str(raised.value) == (
        "no Ray answers at ray://head:10001: nobody there. Start one there with ray start --head, "
        "or leave the address out"
    )


# ---- real processes ----------------------------------------------------------------------------


class Killer(Progress):
    """Kills a worker with SIGKILL when the first block is finished."""

    def __init__(self) -> None:
        super().__init__()
        self.killed = 0

    def step(self, detail: str = "", steps: int = 1) -> None:
        super().step(detail, steps)
        if self._stage.startswith("cutting") and self._done >= 1 and not self.killed:
            for process in psutil.Process().children(recursive=True):
                if "secateur.block_worker" in process.cmdline() and not self.killed:
                    os.kill(process.pid, signal.SIGKILL)
                    self.killed = process.pid


def eight_blocks(folder: Path) -> Path:
    return tiny.write_model(folder / "model", "llama-gqa-tied", layers=8)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A model of eight blocks, and what one process with one thread makes of it."""
    import torch

    root = tmp_path_factory.mktemp("deep")
    source, before = eight_blocks(root), torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        prune(source, root / "out", recipe("comp"), verify=False)
    finally:
        torch.set_num_threads(before)
    return source, bytes_of(root / "out")


def test_two_processes_of_which_one_is_killed(
    deep: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    source, files = deep
    killer = Killer()
    prune(source, tmp_path / "out", recipe("comp"), verify=False, workers=2, progress=killer)
    assert killer.killed
    assert bytes_of(tmp_path / "out") == files
    assert not workers_of(psutil.Process())


def test_a_run_that_is_told_to_end_takes_its_workers_along(
    deep: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    code = "from test_workers import *; prune(sys.argv[1], sys.argv[2], recipe('comp'), workers=2)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(deep[0]), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    until = time.monotonic() + 500
    while len(found := workers_of(psutil.Process(process.pid))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.wait()
    _, alive = psutil.wait_procs(found, timeout=100)
    assert alive == []


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if "secateur.block_worker" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:  # ended meanwhile
            continue
    return found


def test_two_processes_of_a_ray_of_which_one_is_killed(
    deep: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """A Ray that is started here, and that ends with the run."""
    pytest.importorskip("ray")
    source, files = deep
    killer, out = Killer(), tmp_path / "out"
    try:
        prune(source, out, recipe("comp"), verify=False, workers=2, cluster="ray", progress=killer)
    except OutputError as error:
        if "Ray does not start on this machine" not in str(error):
            raise
        pytest.skip(str(error))  # it gives its own processes 15 seconds and no more
    assert killer.killed
    assert bytes_of(tmp_path / "out") == files
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    assert not [name for name in names if "raylet" in name or "gcs_server" in name]
