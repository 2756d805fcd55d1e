"""One tiny model for all tests of a run."""

from pathlib import Path

import pytest

from helpers.tiny_texts import write_model_with_texts
from helpers.verbs import run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_with_texts(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    run("quantize", tiny, "-o", out, "--recipe", "rtn", "--no-eval")
    return out
