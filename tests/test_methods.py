"""What must hold for every method: the plan is what prune does, the folder what the plan says, and
a run that is killed ends in the same bytes. A new method is one line in :data:`CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import bytes_of
from forks import forks
from test_kill import KILLED
from test_outputs import logits_of, modules_cache, random_tokens, reopen
from test_pipeline import same_plans

from secateur.checkpoint import open_checkpoint
from secateur.masking import masked_hidden
from secateur.methods import method_class, method_names
from secateur.pipeline import make_plan
from secateur.pruning import prune
from secateur.recipe import Recipe, make_recipe
from secateur.streaming import Stream

__all__ = ["modules_cache"]  # a fixture that runs by itself

Folder = Callable[[str], Path]
#: Grouped query heads and a tied head; biases in every layer; LayerNorm, ReLU and biases.
FAMILIES = ["llama-gqa-tied", "llama-biases", "opt"]
STRUCTURED = {"layers": 0, "exempt_first": 0, "exempt_last": 0, "grid": 8}
EXEMPT_NONE = {"exempt_first": 0, "exempt_last": 0}
#: Method and options, as many of each as go different ways through the engine.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "comp": ("comp", STRUCTURED),
    "obs": ("obs", STRUCTURED),
    "obs by gradients": ("obs", {**STRUCTURED, "gradients": 0.5}),
    "shortgpt": ("shortgpt", {}),
    "shortgpt compensated": ("shortgpt", {"compensate": True}),
    "obs compensated": ("obs", {**STRUCTURED, "layers": 1, "compensate": True}),
    "shortgpt iterative": ("shortgpt", {"order": "iterative", "distance": "angular"}),
    "sleb": ("sleb", {}),
    "random": ("random", {}),
    "random global": ("random", {"shares": "global"}),
    "magnitude-sp": ("magnitude-sp", {}),
    "wanda-sp": ("wanda-sp", {}),
    "wanda-sp neurons": ("wanda-sp", {"groups": "keep", "inputs": "identical"}),
    "flap": ("flap", {}),
    "flap UL-UM": ("flap", {"shares": "UL-UM", "metric": "WIFN"}),
    "fpt": ("fpt", {}),
    "fpt plain": ("fpt", {"rearrange": False, "tune": False, "batch": 2}),
    "llm-pruner": ("llm-pruner", EXEMPT_NONE),
    "llm-pruner global": ("llm-pruner", {**EXEMPT_NONE, "shares": "global", "score": "param_mix"}),
    "saap": ("saap", EXEMPT_NONE),
    "saap off": ("saap", {**EXEMPT_NONE, "fluctuation": "off", "sigma": "group"}),
    "flap alone": ("flap", {"bias": False, "metric": "IFV", "square_heads": False}),
}
#: Those that go different ways through the journal.
TO_KILL = ["obs by gradients", "obs compensated", "sleb", "wanda-sp", "flap", "fpt", "llm-pruner"]


def recipe(case: str, **fields: Any) -> Recipe:
    method, options = CASES[case]
    return make_recipe(
        **{
            "remove": "45%", "of": "decoder", "method": method, "options": options,
            "calibration": {"samples": 3, "length": 20}, **fields,
        }
    )  # fmt: skip


def test_every_method_is_here() -> None:
    elsewhere = {"slicegpt"}  # cuts no block by itself: tests/test_slicegpt.py
    elsewhere |= {n for n in method_names() if method_class(n).makes_zeros}
    assert {method for method, _ in CASES.values()} | elsewhere == set(method_names())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_the_folder_computes_what_the_plan_says(
    case: str, name: str, model_folder: Folder, tmp_path: Path
) -> None:
    source, asked = model_folder(name), recipe(case)
    planned = make_plan(source, asked).plan
    done = prune(source, tmp_path / "out", asked, verify=False)
    assert same_plans(planned, done.plan)
    before, after = done.plan.sizes_before(), done.plan.sizes()
    grain = done.plan.anatomy.block_parameters / 2 / before.decoder
    assert abs(after.decoder_share_removed(before) - 0.45) <= grain

    model = reopen(done.out)
    assert sum(p.numel() for p in model.parameters()) == after.parameters
    stream, tokens = Stream(open_checkpoint(source)), random_tokens(2, 12)
    found: list[torch.Tensor] = []
    hidden = masked_hidden(stream, done.plan, tokens, torch.float32)
    stream.head(hidden, tokens, lambda _, window: found.append(window))
    got = logits_of(model, tokens)
    torch.testing.assert_close(got, torch.stack(found), rtol=1e-4, atol=1e-4)
    whole = torch.stack(found).clone()
    found.clear()
    stream.head(stream.forward(tokens), tokens, lambda _, window: found.append(window))
    assert (whole - torch.stack(found)).abs().max() > 1e-2  # and something was lost


@pytest.fixture(scope="module")
def forked(model_folder: Folder) -> Any:
    """Prune in a fork, to its end or to the moment at which it is killed."""
    with forks(model_folder("llama-gqa-tied"), recipe) as ask:
        yield ask


@pytest.mark.parametrize("case", TO_KILL)
def test_killed_and_gone_on_with(case: str, forked: Any, tmp_path: Path) -> None:
    """After every line of the journal, and in the middle of the one before the first block."""
    status, moments = forked(case, tmp_path / "whole")
    assert status == 0
    wanted = bytes_of(tmp_path / "whole")
    lines = [i for i, name in enumerate(moments) if name.startswith("after line")]
    first = moments.index("before line block")
    for at in [*lines, first - 1, first + 1]:
        out = tmp_path / str(at) / "out"
        assert forked(case, out, at)[0] == KILLED
        status, again = forked(case, out)
        assert status == 0
        assert bytes_of(out) == wanted
        for kind in (
            "layers",
            "removed",
            "shares",
            "block",
        ):  # what is in the journal is not done again
            done = moments[: at + 1].count(f"after line {kind}")
            assert again.count(f"after line {kind}") == moments.count(f"after line {kind}") - done
