"""One tiny model for all server tests of a run, and an app over it for each file."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from helpers import serving
from helpers.calling import write_calling_llama
from helpers.tiny import write_tiny_llama
from qoq.server.model import ServedModel


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_tiny_llama(folder, seed=11)
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> ServedModel:
    return serving.load(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(model: ServedModel) -> AsyncIterator[serving.Client]:
    async with serving.client(model) as client:
        yield client


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A model whose template has tools, and whose vocabulary has the marks of calls."""
    folder = tmp_path_factory.mktemp("calling")
    write_calling_llama(folder)
    return serving.load(folder)
