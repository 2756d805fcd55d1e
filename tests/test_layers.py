"""Imports only go down, and neighbours at one level never import each other."""

import ast
from pathlib import Path

import pytest

import qoq

ROOT = Path(qoq.__file__).parent
# Top first. A part may import itself and everything at the levels below its own.
LEVELS = (
    ("cli", "server", "llm", "batch", "bench", "evaluate"),
    ("api",),
    ("engine", "quantize"),
    ("models",),
    ("checkpoint", "kvcache", "kernels", "tokenizer", "tools", "client"),
    ("formats", "child"),
    ("errors",),
)
LEVEL_OF = {part: depth for depth, level in enumerate(LEVELS) for part in level}
# cli is the front of its level: verbs call what stands beside them.
FRONTS = {"cli": {"server", "llm", "batch", "bench", "evaluate"}}
DOORS = ("__init__", "__main__")


def part_of(file: Path) -> str:
    """The level list's name for a file: its folder, or the module itself."""
    first = file.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """Parts of qoq that a source imports, inside functions too (``qoq`` itself: its version)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            base = node.module or ""
            names = [f"{base}.{a.name}" for a in node.names] if base == "qoq" else [base]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("qoq.")}
    return found - {"__version__"}


def violations(part: str, imports: set[str]) -> set[str]:
    """Those of ``imports`` that ``part`` must not import."""
    allowed = {p for p, depth in LEVEL_OF.items() if depth > LEVEL_OF[part]}
    return imports - allowed - {part} - FRONTS.get(part, set())


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down(file: Path) -> None:
    part = part_of(file)
    if part in DOORS:
        return  # the public door leads everywhere
    assert part in LEVEL_OF, f"{part} has no level"
    wrong = violations(part, imported_parts(file.read_text(encoding="utf-8")))
    assert not wrong, f"{file.name} imports {sorted(wrong)}"


def test_the_rule_can_be_broken() -> None:
    assert imported_parts("from qoq import LLM, __version__\nimport qoq.engine.engine") == {
        "LLM",
        "engine",
    }
    assert imported_parts("def f():\n    from qoq.models.load import load_model") == {"models"}
    assert violations("kernels", {"models", "formats", "kernels"}) == {"models"}
    assert violations("engine", {"quantize", "errors"}) == {"quantize"}
    assert violations("evaluate", {"llm", "engine"}) == {"llm"}
    assert violations("cli", {"llm", "evaluate", "formats"}) == set()
    assert violations("server", {"llm", "evaluate", "engine", "kernels"}) == {"llm", "evaluate"}
