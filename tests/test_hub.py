"""Models named by a hub id. The hub is faked: what counts is what we ask it and what we tell."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from secateur.checkpoint import open_checkpoint
from secateur.errors import SourceError, one_line
from secateur.streaming import Stream

REPO = "org/tiny-model"


class FakeHub:
    """Stands for ``huggingface_hub.snapshot_download``: copies a folder, or raises."""

    def __init__(self, cache: Path) -> None:
        self.folder: Path | None = None
        self.failure: BaseException | None = None
        self.asked: list[str] = []
        self._cache = cache

    def snapshot_download(self, repo: str, *, allow_patterns: list[str]) -> str:
        self.asked.append(repo)
        if self.failure is not None:
            raise self.failure
        assert self.folder is not None
        target = self._cache / repo.replace("/", "--")
        target.mkdir(parents=True)
        for path in self.folder.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, target / path.name)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)  # where no folder of that name lies
    return fake


@pytest.fixture
def repository(tmp_path: Path, model_folder: Callable[[str], Path]) -> Path:
    """What the repository holds; a test may change it."""
    folder = shutil.copytree(model_folder("llama-gqa-tied"), tmp_path / "repository")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit('was run')")
    return folder


def http_error(kind: type[errors.HfHubHTTPError], status: int = 404) -> errors.HfHubHTTPError:
    """An error as the hub's client raises it, whichever http library it was built with."""
    response = SimpleNamespace(headers={}, status_code=status, request=None)
    return kind("of several\nlines", response=response)  # type: ignore[arg-type]


def refused(source: str = REPO) -> str:
    with pytest.raises(SourceError) as error:
        open_checkpoint(source)
    text, code = one_line(error.value)
    assert code == 2
    return text


def test_fetched_model_opens(hub: FakeHub, repository: Path) -> None:
    hub.folder = repository
    checkpoint = open_checkpoint(REPO)
    assert hub.asked == [REPO]
    assert checkpoint.source == REPO
    assert Stream(checkpoint).anatomy.parameters == 40_608
    assert checkpoint.tokenizer("a", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("trust", [False, True])
def test_neither_pickles_nor_unasked_code_are_fetched(
    hub: FakeHub, repository: Path, trust: bool
) -> None:
    hub.folder = repository
    folder = open_checkpoint(REPO, trust_remote_code=trust).folder
    assert not (folder / "pytorch_model.bin").exists()
    assert (folder / "modeling_own.py").exists() == trust


def test_a_folder_of_that_name_wins(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / REPO)
    assert open_checkpoint(REPO).folder == Path(REPO)
    assert hub.asked == []


@pytest.mark.parametrize("source", ["name-alone", "a/b/c", "./a/b", "/a/b", "../a/b", "org/", ""])
def test_paths_are_not_looked_up(hub: FakeHub, source: str) -> None:
    refused(source)
    assert hub.asked == []


def test_gated(hub: FakeHub) -> None:
    hub.failure = http_error(errors.GatedRepoError, 403)
    assert refused() == (
        f"source {REPO} is gated: accept its terms on its page, then hf auth login"
    )


def test_no_such_repository(hub: FakeHub) -> None:
    hub.failure = http_error(errors.RepositoryNotFoundError)
    assert refused() == (
        f"source {REPO} is neither a folder here nor a repository on the hub: check the spelling, "
        "or log in with hf auth login if it is private"
    )


@pytest.mark.parametrize("source", ["models/a--b", "models/a..b", "models/name-"])
def test_a_name_that_no_repository_can_have(source: str) -> None:
    # The client itself refuses these, before any network.
    assert refused(source).startswith(f"source {source} is neither a folder here nor a repository")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (errors.LocalEntryNotFoundError("long\ntext"), ""),
        (http_error(errors.HfHubHTTPError, 500), " (of several)"),
        (http_error(errors.RevisionNotFoundError), " (of several)"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), " ([Errno 104] reset)"),
        (RuntimeError("from the\nhttp library"), " (from the)"),
    ],
)
def test_out_of_reach(hub: FakeHub, failure: Exception, reason: str) -> None:
    hub.failure = failure
    assert refused() == (
        f"source {REPO} is no folder here and the hub cannot be reached{reason}: check the "
        "network, or give a local folder or GGUF file"
    )


def test_full_disk_is_not_taken_for_the_network(hub: FakeHub) -> None:
    hub.failure = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
    with pytest.raises(OSError, match="No space left") as error:
        open_checkpoint(REPO)
    assert one_line(error.value)[0].startswith("the disk is full while writing /cache/blob")


def test_interruption_is_not_taken_for_the_network(hub: FakeHub) -> None:
    hub.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(REPO)


def test_pickles_only(hub: FakeHub, repository: Path) -> None:
    (repository / "model.safetensors").unlink()
    hub.folder = repository
    assert refused() == (
        f"source {REPO} has no safetensors weights (pickled ones are not opened): convert it once, "
        "where you trust it, with transformers' save_pretrained, and give that folder"
    )


def test_damage_is_told_with_the_file(hub: FakeHub, repository: Path) -> None:
    hub.folder = repository
    weights: Any = repository / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50_000])
    assert "model.safetensors is cut short: tensor " in refused()
