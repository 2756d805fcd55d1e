"""Tokenizer, Detokenizer and StopMatcher: round trips, code points, stop strings, bad folders."""

import contextlib
import json
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiny import BOS, EOS, write_byte_tokenizer, write_fallback_tokenizer
from qoq.errors import RequestError, SourceError
from qoq.tokenizer import Detokenizer, StopMatcher, Tokenizer

FIRST_WORD = 3 + 256  # of write_fallback_tokenizer: special ids, bytes, then words
BUNDLED = Path(__file__).parents[1] / "examples" / "books-llama"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte")
    write_byte_tokenizer(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("fallback")
    write_fallback_tokenizer(folder)
    return Tokenizer.load(folder)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def test_bundled_tokenizer_round_trips_and_knows_its_end() -> None:
    tokenizer = Tokenizer.load(BUNDLED)
    text = "“Holmes,” said I — 'naïve'\n  twice  "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids == (1,)
    assert len(tokenizer) == 8192


def test_no_network_for_a_local_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a local tokenizer asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Tokenizer.load(BUNDLED).encode("x")


@pytest.mark.parametrize("first", ["byte_level", "fallback"])
@given(data=st.data())
def test_a_choice_of_special_tokens_is_shown(
    first: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(first)
    ids = data.draw(st.lists(st.sampled_from([BOS, EOS, *tokenizer.encode("ab é", special=False)])))
    cut = data.draw(st.integers(0, len(ids)))
    assert set(tokenizer.special_ids) == {0, 1, 2}

    def text(shown: list[int]) -> str:
        detokenizer = Detokenizer(tokenizer, ids[:cut], shown=shown)
        return "".join([*map(detokenizer.push, ids[cut:]), detokenizer.flush()])

    assert text([EOS]).count("<|eos|>") == ids[cut:].count(EOS)
    assert "<|bos|>" not in text([EOS])
    assert text([BOS, EOS]).count("<|bos|>") == ids[cut:].count(BOS)


def test_special_tokens_are_hidden_in_text(byte_level: Tokenizer) -> None:
    ids = [BOS, *byte_level.encode("hello"), EOS]
    assert byte_level.decode(ids) == "hello"
    assert byte_level.decode(ids, skip_special=False) == "<|bos|>hello<|eos|>"
    assert byte_level.decode([]) == ""


def test_chat_template(byte_level: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello world"}]
    ids = byte_level.encode_chat(messages)
    assert ids[0] == BOS
    assert byte_level.decode(ids) == "[user] hello world\n[assistant] "
    assert (
        byte_level.decode(byte_level.encode_chat(messages, add_generation_prompt=False))
        == "[user] hello world\n"
    )


def test_chat_without_template_or_with_bad_messages(fallback: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        fallback.encode_chat([{"role": "user", "content": "a"}])
    write_byte_tokenizer(tmp_path, template="{{ raise_exception('only users may speak') }}")
    with pytest.raises(RequestError, match="only users may speak"):
        Tokenizer.load(tmp_path).encode_chat([{"role": "system", "content": "a"}])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 3}, (7, 9)),
        ({"eos_token_id": [7, 7]}, None, (7,)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, (3, 4)),
        (None, {"model_type": "llama"}, (EOS,)),
        (None, None, (EOS,)),
    ],
)
def test_eos_ids(
    tmp_path: Path, generation: dict | None, config: dict | None, expected: tuple[int, ...]
) -> None:
    write_byte_tokenizer(tmp_path)
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).eos_ids == expected


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "x"}', '{"eos_token_id": [1, -2]}', "[1", "3"]
)
def test_bad_generation_config(tmp_path: Path, content: str) -> None:
    write_byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(SourceError, match=r"generation_config\.json"):
        Tokenizer.load(tmp_path)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "empty")
    broken = tmp_path / "broken"
    write_byte_tokenizer(broken)
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(SourceError, match="cannot be read"):
        Tokenizer.load(broken)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    shutil.copytree(
        BUNDLED, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors", "*.txt")
    )
    config_file = tmp_path / "m" / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    config_file.write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    )
    with contextlib.suppress(SourceError):
        Tokenizer.load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


@given(text=st.text(max_size=30))
def test_streamed_text_is_the_decoded_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text, special=False)
    pieces = stream(byte_level, ids)
    assert "".join(pieces) == byte_level.decode(ids) == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(text=st.text(alphabet="ab cd é你😀\n", max_size=20))
def test_streamed_text_with_byte_fallback(fallback: Tokenizer, text: str) -> None:
    ids = fallback.encode(text, special=False)
    assert "".join(stream(fallback, ids)) == fallback.decode(ids) == text


@given(ids=st.lists(st.integers(3, 260), max_size=20))
def test_streamed_bytes_that_are_no_text(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)


@given(ids=st.lists(st.integers(0, FIRST_WORD + 7), max_size=20))
def test_byte_fallback_survives_anything(fallback: Tokenizer, ids: list[int]) -> None:
    """Such decoders spoil a whole row of bytes for one bad byte; what came out cannot be unsaid."""
    streamed = iter("".join(stream(fallback, ids)))
    words = fallback.decode([i for i in ids if i >= FIRST_WORD]).replace(" ", "")
    assert all(letter in streamed for letter in words)  # in this order


def test_no_piece_splits_a_code_point(byte_level: Tokenizer, fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, fallback):
        pieces = stream(tokenizer, tokenizer.encode("a😀é你好", special=False))
        assert [p for p in pieces if p.strip()] == ["a", "😀", "é", "你", "好"]


def test_text_waits_for_at_most_three_bytes(byte_level: Tokenizer) -> None:
    """A model that emits endless garbage still shows that it does."""
    stray = byte_level.encode("é", special=False)[1]  # a continuation byte on its own
    shown = "".join(stream(byte_level, [stray] * 10)[:10])
    assert shown == "\ufffd" * 7


def test_unfinished_code_point_at_the_end_is_shown(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a😀", special=False)[:-1]
    assert stream(byte_level, ids)[-1] == "\ufffd"


def test_prompt_is_continued_not_repeated(byte_level: Tokenizer, fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, fallback):
        prompt = tokenizer.encode("ab c", special=False)
        whole = tokenizer.encode("ab c abcd 😀", special=False)
        assert whole[: len(prompt)] == prompt
        assert "".join(stream(tokenizer, whole[len(prompt) :], prompt)) == " abcd 😀"
    cut = byte_level.encode("a😀", special=False)
    assert "".join(stream(byte_level, cut[3:], cut[:3])) == "😀"


def test_stop_string_across_pieces() -> None:
    matcher = StopMatcher(["\n\nQ:", "END"])
    assert [matcher.push(p) for p in ("a\n", "\n", "b", "\n\nQ", "x E", "N", "D more")] == [
        "a", "", "\n\nb", "", "\n\nQx ", "", "",
    ]  # fmt: skip
    assert matcher.matched
    assert matcher.push("more") == matcher.flush() == ""


def test_stop_string_that_the_text_ends_with() -> None:
    matcher = StopMatcher(["END"], include=True)
    assert [matcher.push(p) for p in ("a E", "N", "D more")] == ["a ", "", "END"]
    assert (matcher.push("more"), matcher.flush(), matcher.found) == ("", "", "END")


def test_stop_string_that_never_comes() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN") == "the "
    assert (matcher.flush(), matcher.matched) == ("EN", False)


@given(
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=8),
)
def test_stop_matcher_ends_before_the_first_stop(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    upto = ""
    for piece in pieces:  # a stop is seen with the piece that completes it
        upto += piece
        out += matcher.push(piece)
        if any(s in upto for s in stops):
            break
    found = [upto.find(s) for s in stops if s in upto]
    assert matcher.matched == bool(found)
    assert out + matcher.flush() == (upto[: min(found)] if found else upto)
