"""Child processes: answers, deaths, limits, and what becomes of the next question."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qoq.child import Child
from qoq.errors import ResourceError

SOURCE = """
import json, os, sys, time
hello = json.loads(sys.stdin.readline())
if hello["greeting"] == "silence":
    sys.exit(3)
print('{"ready": true}', flush=True)
for line in sys.stdin:
    asked = json.loads(line)["say"]
    if asked == "hang":
        time.sleep(1000)
    if asked == "die":
        os._exit(7)
    answer = json.dumps({"said": asked, "by": os.getpid()})
    print("{" if asked == "nonsense" else answer, flush=True)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "parrot.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return "parrot"


@pytest.fixture
def child(module: str) -> Iterator[Child]:
    child = Child(module, lambda: {"greeting": "hello"})
    yield child
    child.close()


def test_one_process_answers_all_threads(child: Child) -> None:
    child.start()
    answers: list[dict[str, object] | None] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(child.ask({"say": f"ü{i}\n"}, 60)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {str(a and a["said"]) for a in answers} == {f"ü{i}\n" for i in range(8)}
    assert len({a and a["by"] for a in answers}) == 1


@pytest.mark.parametrize("question", ["hang", "die", "nonsense"])
def test_no_answer_is_none_and_the_next_question_gets_one(child: Child, question: str) -> None:
    first = child.ask({"say": "a"}, 60)
    start = time.monotonic()
    assert child.ask({"say": question}, 0.5) is None
    assert time.monotonic() - start < 30
    again = child.ask({"say": "b"}, 60)
    assert first is not None
    assert again is not None
    assert (again["said"], again["by"] == first["by"]) == ("b", False)


def test_ends_with_its_owner(module: str) -> None:
    child = Child(module, lambda: {"greeting": "hello"})
    answer = child.ask({"say": "a"}, 60)
    assert answer is not None
    folder = Path(f"/proc/{answer['by']}")
    if not folder.parent.joinpath("self").exists():
        pytest.skip("needs /proc")
    assert folder.exists()
    del child
    assert not folder.exists()


def test_one_that_does_not_start_is_told(module: str) -> None:
    with pytest.raises(ResourceError, match="parrot does not start"):
        Child(module, lambda: {"greeting": "silence"}).start()
