"""The extension's stub, which types are checked against, names what the extension has."""

import ast
from pathlib import Path

import pytest

import qoq
from qoq.kernels.cpu import backend


def test_the_stub_names_what_there_is() -> None:
    missing = backend.missing()
    if missing:
        pytest.skip(missing)
    source = (Path(qoq.__file__).parent / "_C.pyi").read_text(encoding="utf-8")
    body = ast.parse(source).body
    stated = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert stated == {name for name in dir(backend.extension()) if not name.startswith("_")}
