"""attention: the oracle against plain loops in float64 over random pages."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qoq.errors import BackendUnavailable
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat
from qoq.kernels import attention as attention_module
from qoq.kernels.attention import attention

BITS = list(itertools.product((4, 8, 16), repeat=2))


def random_pages(bits: tuple[int, int], num: int, heads: int, size: int, dim: int) -> KVPages:
    """Pages full of random bytes, scales and offsets: nothing of kv_append is needed."""
    pages = KVPages.empty(KVFormat(*bits), num, heads, size, dim)
    for codes in (pages.k_codes, pages.v_codes):
        if codes.dtype == torch.uint8:
            codes.copy_(torch.randint(0, 256, codes.shape))
        else:
            codes.normal_()
    for n, scale, offset in (
        (bits[0], pages.k_scale, pages.k_offset),
        (bits[1], pages.v_scale, pages.v_offset),
    ):
        if scale.numel():
            scale.uniform_(0.5, 1.0).mul_(4 / 2**n)
            offset.normal_().sub_(2)
    return pages


def vector(pages: KVPages, side: str, page: int, head: int, offset: int) -> list[float]:
    """One cached vector, decoded value by value."""
    codes = getattr(pages, f"{side}_codes")[page, head, offset].tolist()
    bits = getattr(pages.format, f"{side}_bits")
    if bits == 16:
        return [float(c) for c in codes]
    if bits == 4:
        codes = [nibble for byte in codes for nibble in (byte % 16, byte // 16)]
    scale = getattr(pages, f"{side}_scale")[page, head, offset].item()
    low = getattr(pages, f"{side}_offset")[page, head, offset].item()
    return [c * scale + low for c in codes]


@dataclass
class Case:
    """One call: the arguments of attention."""

    q: Tensor
    pages: KVPages
    page_table: Tensor
    kv_lens: Tensor
    cu_seqlens_q: Tensor
    sm_scale: float
    window: int | None

    def run(self) -> Tensor:
        return attention(
            self.q,
            self.pages,
            self.page_table,
            self.kv_lens,
            self.cu_seqlens_q,
            self.sm_scale,
            self.window,
        )

    def naive(self) -> Tensor:
        out = torch.empty(self.q.shape, dtype=torch.float64)
        heads, size = self.q.shape[1], self.pages.page_size
        group = heads // self.pages.k_codes.shape[1]
        cu = self.cu_seqlens_q.tolist()
        for s, kv_len in enumerate(self.kv_lens.tolist()):
            for row, h in itertools.product(range(cu[s], cu[s + 1]), range(heads)):
                position = kv_len - (cu[s + 1] - row)
                q = self.q[row, h].tolist()
                scores, values = [], []
                for j in range(position + 1):
                    if self.window is not None and j <= position - self.window:
                        continue
                    where = int(self.page_table[s, j // size]), h // group, j % size
                    key = vector(self.pages, "k", *where)
                    scores.append(self.sm_scale * math.fsum(map(float.__mul__, q, key)))
                    values.append(vector(self.pages, "v", *where))
                top = max(scores)
                p = [math.exp(x - top) for x in scores]
                mixed = [
                    math.fsum(w * v[i] for w, v in zip(p, values, strict=True))
                    for i in range(len(q))
                ]
                out[row, h] = torch.tensor(mixed, dtype=torch.float64) / math.fsum(p)
        return out


def make_case(
    lens: list[tuple[int, int]],
    *,
    bits: tuple[int, int] = (4, 4),
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    page_size: int = 4,
    window: int | None = None,
) -> Case:
    """``lens``: (q_len, kv_len) per sequence; pages are dealt out in random order."""
    counts = [-(-kv // page_size) for _, kv in lens]
    pages = random_pages(bits, sum(counts) + 2, heads[1], page_size, dim)
    ids = (torch.randperm(sum(counts) + 1) + 1).tolist()  # page 0 belongs to nobody
    table = torch.zeros(len(lens), max(counts, default=0) + 1, dtype=torch.int32)
    for s, n in enumerate(counts):
        table[s, :n] = torch.tensor([ids.pop() for _ in range(n)], dtype=torch.int32)
    q_lens = [q for q, _ in lens]
    return Case(
        torch.randn(sum(q_lens), heads[0], dim) * 2,
        pages,
        table,
        torch.tensor([kv for _, kv in lens], dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32),
        dim**-0.5,
        window,
    )


def assert_equal_to_naive(case: Case) -> None:
    got = case.run()
    assert got.dtype == torch.float32
    assert got.shape == case.q.shape
    torch.testing.assert_close(got.double(), case.naive(), rtol=1e-4, atol=1e-5)


lengths = st.tuples(st.integers(0, 6), st.integers(0, 9)).map(lambda p: (p[0], p[0] + p[1]))


@settings(max_examples=40)
@given(
    lens=st.lists(lengths, max_size=4),
    bits=st.sampled_from(BITS),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 2)]),
    dim=st.sampled_from([2, 6, 8]),
    page_size=st.sampled_from([1, 3, 16]),
    window=st.sampled_from([None, None, 1, 2, 5, 100]),
)
def test_ragged_batches(
    lens: list[tuple[int, int]],
    bits: tuple[int, int],
    heads: tuple[int, int],
    dim: int,
    page_size: int,
    window: int | None,
) -> None:
    case = make_case(lens, bits=bits, heads=heads, dim=dim, page_size=page_size, window=window)
    assert_equal_to_naive(case)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("window", [None, 4])
def test_prefill_chunk_and_decode_in_one_call(bits: tuple[int, int], window: int | None) -> None:
    assert_equal_to_naive(make_case([(5, 5), (1, 9), (0, 3), (3, 10)], bits=bits, window=window))


@pytest.mark.parametrize("window", [None, 1, 7, 64, 70])
def test_many_query_blocks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(150, 201), (1, 130)], bits=(16, 16), heads=(2, 1), window=window)
    want = dense(case)
    torch.testing.assert_close(case.run().double(), want, rtol=1e-4, atol=1e-5)
    for rows, segment in ((1, 1), (8, 64), (64, 64)):
        monkeypatch.setattr(attention_module, "_ROWS", rows)
        monkeypatch.setattr(attention_module, "SEGMENT", segment)
        torch.testing.assert_close(case.run().double(), want, rtol=1e-4, atol=1e-5)


def dense(case: Case) -> Tensor:
    """float64 masked softmax over whole score matrices; 16-bit pages only."""
    out = torch.empty(case.q.shape, dtype=torch.float64)
    cu = case.cu_seqlens_q.tolist()
    group = case.q.shape[1] // case.pages.k_codes.shape[1]
    for s, kv_len in enumerate(case.kv_lens.tolist()):
        ids = case.page_table[s].long()
        halves = (case.pages.k_codes, case.pages.v_codes)
        cached = [codes[ids].double().transpose(0, 1).flatten(1, 2)[:, :kv_len] for codes in halves]
        k, v = (half.repeat_interleave(group, 0) for half in cached)
        q = case.q[cu[s] : cu[s + 1]].double().transpose(0, 1)
        own = torch.arange(kv_len - q.shape[1], kv_len)[:, None]
        key = torch.arange(kv_len)
        seen = (key <= own) & (key > own - (case.window or kv_len + 1))
        scores = (q @ k.mT * case.sm_scale).where(seen, -torch.inf)
        out[cu[s] : cu[s + 1]] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("bits", [(4, 4), (16, 16)])
@pytest.mark.parametrize("window", [None, 5, 300])
def test_a_row_does_not_know_its_chunk(bits: tuple[int, int], window: int | None) -> None:
    """To the bit, wherever a prompt is cut: design decision 3."""
    total, size = 600, 16
    whole = make_case(
        [(total, total)], bits=bits, heads=(6, 2), dim=64, page_size=size, window=window
    )
    out = whole.run()
    for cut in (1, 33, 255, 256, 257, 598):
        for start, stop in ((0, cut), (cut, total), (cut, cut + 1)):
            part = replace(
                whole,
                q=whole.q[start:stop],
                kv_lens=torch.tensor([stop], dtype=torch.int32),
                cu_seqlens_q=torch.tensor([0, stop - start], dtype=torch.int32),
            )
            assert torch.equal(part.run(), out[start:stop]), (cut, start, stop)


@pytest.mark.parametrize("window", [None, 6])
def test_a_sequence_does_not_know_its_batch(window: int | None) -> None:
    case = make_case([(70, 90), (1, 33), (0, 5), (4, 4)], dim=64, page_size=16, window=window)
    together = case.run()
    cu = case.cu_seqlens_q.tolist()
    for s in range(4):
        alone = attention(
            case.q[cu[s] : cu[s + 1]],
            case.pages,
            case.page_table[s : s + 1],
            case.kv_lens[s : s + 1],
            torch.tensor([0, cu[s + 1] - cu[s]]),
            case.sm_scale,
            window,
        )
        assert torch.equal(alone, together[cu[s] : cu[s + 1]])


def test_nothing_outside_the_visible_keys_is_read() -> None:
    case = make_case([(2, 10), (1, 7)], bits=(16, 16), page_size=4, window=3)
    want = case.run()
    visible = torch.zeros(case.pages.num_pages, 4, dtype=torch.bool)
    for s, (first, kv_len) in enumerate(((6, 10), (4, 7))):
        for j in range(first, kv_len):
            visible[int(case.page_table[s, j // 4]), j % 4] = True
    for codes in (case.pages.k_codes, case.pages.v_codes):
        codes.transpose(1, 2)[~visible] = 1e30
    case.page_table[:, 3:] = 99  # past the sequence: not even a page id
    case.page_table[0, 0] = case.page_table[1, 0] if visible[case.page_table[1, 0]].any() else 0
    torch.testing.assert_close(case.run(), want)


def test_poison_behind_the_last_token_is_not_read() -> None:
    case = make_case([(3, 6)], bits=(4, 8), page_size=4)
    want = case.run()
    last = int(case.page_table[0, 1])
    for qparam in (case.pages.k_scale, case.pages.v_offset):
        qparam[last, :, 2:] = torch.nan
        qparam[0] = torch.nan
    assert torch.equal(case.run(), want)


def test_chunked_prefill_equals_whole_prefill() -> None:
    case = make_case([(40, 40)], heads=(4, 2), dim=16, page_size=8)
    want = case.run()
    got = []
    for start, stop in itertools.pairwise((0, 1, 13, 39, 40)):
        kv_lens, cu = torch.tensor([stop]), torch.tensor([0, stop - start])
        part = case.q[start:stop]
        got.append(attention(part, case.pages, case.page_table, kv_lens, cu, case.sm_scale))
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-5, atol=1e-6)


def test_one_key_gives_its_value() -> None:
    case = make_case([(1, 1)], bits=(8, 8), heads=(3, 1))
    want = torch.tensor(vector(case.pages, "v", int(case.page_table[0, 0]), 0, 0))
    torch.testing.assert_close(case.run()[0], want.expand(3, -1))


def test_large_scores_stay_finite() -> None:
    case = make_case([(6, 20)], bits=(16, 16))
    case.q.mul_(1e4)
    assert case.run().isfinite().all()


def test_query_is_left_alone_and_half_is_widened() -> None:
    case = make_case([(4, 6)])
    before = case.q.clone()
    want = case.run()
    assert torch.equal(case.q, before)
    case.q = case.q.half()
    got = case.run()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-1, atol=1e-2)


def test_refusals() -> None:
    case = make_case([(4, 6)])
    for wrong in (torch.tensor([3]), torch.tensor([99])):
        with pytest.raises(ValueError, match="do not fit"):
            attention(case.q, case.pages, case.page_table, wrong, case.cu_seqlens_q, 1.0)
    with pytest.raises(ValueError, match="do not share"):
        attention(case.q[:, :3], case.pages, case.page_table, case.kv_lens, case.cu_seqlens_q, 1.0)
    with pytest.raises(BackendUnavailable):
        attention(
            case.q, case.pages, case.page_table, case.kv_lens, case.cu_seqlens_q, 1.0, backend="cpu"
        )
