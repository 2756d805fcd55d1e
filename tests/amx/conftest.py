"""These tests need the emulator: `make emulate-amx` builds it and runs them."""

import os
from collections.abc import Iterator

import pytest

from helpers import amx

if not os.environ.get("QOQ_AMX_EMULATOR"):
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def _tiles_are_given_back() -> Iterator[None]:
    before = amx.counts()["in_use"]
    yield
    amx.run("tilerelease")
    assert amx.counts()["in_use"] == before == 0
