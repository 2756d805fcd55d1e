"""One tiny model for all tests of a run."""

from pathlib import Path

import pytest

from helpers.tiny_texts import write_model_with_texts


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_with_texts(tmp_path_factory.mktemp("model") / "tiny-llama")
