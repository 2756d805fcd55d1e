"""The two shapes of logprobs, with the likeliest tokens and a prompt's first place."""

from pathlib import Path

from helpers.tiny import write_byte_tokenizer, write_fallback_tokenizer
from qoq.api.logprobs import LogprobWriter
from qoq.tokenizer import Tokenizer


def test_tokens_read_as_inside_a_text(tmp_path: Path) -> None:
    write_fallback_tokenizer(tmp_path)  # strips a text's first space
    tokenizer = Tokenizer.load(tmp_path)
    writer = LogprobWriter(tokenizer)
    ids = tokenizer.encode("a b c", special=False)
    assert "".join(writer.token(i) for i in ids) == " a b c"
    assert writer.token(1) == "<|eos|>"


def test_completion_shape(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    h, e, space = (tokenizer.encode(c)[0] for c in "he ")
    got = LogprobWriter(tokenizer).completion(
        [h, e, space],
        [None, -1.5, float("-inf")],
        10,
        [{}, {h: -0.5, space: -0.25}, {space: float("-inf")}],
    )
    assert got == {
        "tokens": ["h", "e", " "],
        "token_logprobs": [None, -1.5, -9999.0],
        "top_logprobs": [None, {" ": -0.25, "h": -0.5, "e": -1.5}, {" ": -9999.0}],
        "text_offset": [10, 11, 12],
    }
    assert list(got["top_logprobs"][1]) == [" ", "h", "e"]


def test_chat_shape(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    h, e = (tokenizer.encode(c)[0] for c in "he")
    [entry] = LogprobWriter(tokenizer).chat([h], [-1.0], [{e: -0.5, h: -1.0}])["content"]
    assert entry["token"] == "h"
    assert entry["bytes"] == [104]
    assert [(t["token"], t["logprob"]) for t in entry["top_logprobs"]] == [("e", -0.5), ("h", -1.0)]
