"""attention in C++ over bf16 and fp32 pages: as the oracle, blind to batch, chunks and threads."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.cpu.test_attention import oracle, run
from kernels.test_attention import Case, lengths, make_case
from qoq.formats.kv import KVPages
from qoq.kernels.attention import attention
from qoq.kernels.cpu.attention import unsupported

pytestmark = pytest.mark.usefixtures("variant")

DTYPES = [torch.bfloat16, torch.float32]


def rounded(pages: KVPages, dtype: torch.dtype) -> KVPages:
    """Float pages whose values are those of ``dtype``."""
    return replace(pages, k_codes=pages.k_codes.to(dtype), v_codes=pages.v_codes.to(dtype))


def floats(lens: list[tuple[int, int]], dtype: torch.dtype, **more: object) -> Case:
    case = make_case(lens, bits=(16, 16), **more)  # type: ignore[arg-type]
    return replace(case, pages=rounded(case.pages, dtype))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within 1e-4 of the largest output."""
    assert got.shape == want.shape
    if want.numel():
        assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(lengths, max_size=4),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (14, 2), (8, 1), (40, 1)]),
    dim=st.sampled_from([8, 24, 64, 80]),
    page_size=st.sampled_from([1, 3, 16]),
    window=st.sampled_from([None, None, 1, 2, 5, 100]),
)
def test_ragged_batches(
    lens: list[tuple[int, int]],
    dtype: torch.dtype,
    heads: tuple[int, int],
    dim: int,
    page_size: int,
    window: int | None,
) -> None:
    case = floats(lens, dtype, heads=heads, dim=dim, page_size=page_size, window=window)
    assert_close(run(case), oracle(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 104, 128, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_segments_and_spans(dtype: torch.dtype, dim: int, window: int | None) -> None:
    # Lengths around the segments of 256 keys and the spans of 2048.
    lens = [(1, 255), (2, 256), (1, 257), (40, 600), (1, 2047), (3, 2049), (1, 4500)]
    case = floats(lens, dtype, heads=(4, 2), dim=dim, page_size=16, window=window)
    assert_close(run(case), oracle(case))


def test_keys_and_values_may_differ_in_type() -> None:
    case = floats([(3, 300)], torch.float32, dim=40)
    mixed = replace(case, pages=replace(case.pages, v_codes=case.pages.v_codes.bfloat16()))
    assert_close(run(mixed), oracle(mixed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_long_sequence_is_split_without_a_trace(dtype: torch.dtype) -> None:
    """Alone, a long sequence's spans go to several threads; in a batch they do not."""
    case = floats([(1, 9000)] + [(1, 20)] * 9, dtype, heads=(2, 1), dim=64, page_size=64)
    together = run(case)
    first = replace(
        case,
        q=case.q[:1],
        page_table=case.page_table[:1],
        kv_lens=case.kv_lens[:1],
        cu_seqlens_q=case.cu_seqlens_q[:2],
    )
    assert torch.equal(run(first), together[:1])
    assert_close(together, oracle(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 70])
def test_chunks_and_batches_change_no_bit(dtype: torch.dtype, window: int | None) -> None:
    case = floats([(300, 300)], dtype, heads=(6, 2), dim=72, page_size=16, window=window)
    whole = run(case)
    for cuts in ((0, 300), (0, 1, 13, 255, 256, 257, 300), tuple(range(0, 301, 20))):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            part = replace(
                case,
                q=case.q[start:stop],
                kv_lens=torch.tensor([stop], dtype=torch.int32),
                cu_seqlens_q=torch.tensor([0, stop - start], dtype=torch.int32),
            )
            parts.append(run(part))
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_that_nobody_sees_is_not_read(dtype: torch.dtype) -> None:
    case = floats([(3, 600), (1, 5)], dtype, dim=64, page_size=4, window=10)
    want = run(case)
    visible = torch.zeros(case.pages.num_pages, 4, dtype=torch.bool)
    for s, (first, kv_len) in enumerate(((588, 600), (0, 5))):
        for j in range(first, kv_len):
            visible[int(case.page_table[s, j // 4]), j % 4] = True
    for codes in (case.pages.k_codes, case.pages.v_codes):
        codes.transpose(1, 2)[~visible] = torch.nan
    case.page_table[0, : 588 // 4] = 10**6  # freed long ago
    assert torch.equal(run(case), want)


def test_rows_that_are_no_numbers_stay_alone() -> None:
    case = floats([(4, 40)], torch.bfloat16, heads=(2, 1), dim=64)
    want = run(case)
    case.q[1, 0, 5], case.q[2, 1, 0] = torch.nan, torch.inf
    got = run(case)
    assert got[1, 0].isnan().all()
    assert got[2, 1].isnan().all()
    keep = torch.ones(4, 2, dtype=torch.bool)
    keep[1, 0] = keep[2, 1] = False
    assert torch.equal(got[keep], want[keep])


def test_a_missing_number_among_keys_is_not_lost() -> None:
    case = floats([(1, 258)], torch.bfloat16, heads=(2, 1), dim=64, page_size=258, window=3)
    case.pages.k_codes[int(case.page_table[0, 0]), 0, 255, 7] = torch.nan
    assert run(case).isnan().all()
    assert oracle(case).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharp_large_and_zero_queries(dtype: torch.dtype) -> None:
    case = floats([(6, 500)], dtype, dim=128)
    case.q[0] = 0
    case.q[1:3] *= 30
    case.q[3] *= 1e4
    case.q[4] *= 1e-42
    got = run(case)
    assert got.isfinite().all()
    keep = [0, 1, 2, 4, 5]
    assert_close(got[keep], oracle(case)[keep])


def test_large_numbers_in_pages() -> None:
    case = floats([(2, 20)], torch.bfloat16, dim=8)
    case.pages.v_codes.mul_(1e30)
    assert_close(run(case), oracle(case))


def test_fp32_pages_are_the_oracles_unless_asked_for() -> None:
    case = floats([(5, 700)], torch.float32, dim=64)
    arguments = (case.q, case.pages, case.page_table, case.kv_lens, case.cu_seqlens_q)
    assert torch.equal(attention(*arguments, case.sm_scale), oracle(case))
    assert torch.equal(attention(*arguments, case.sm_scale, backend="cpu"), run(case))
    arguments = (case.q, rounded(case.pages, torch.bfloat16), *arguments[2:])
    assert torch.equal(
        attention(*arguments, case.sm_scale), attention(*arguments, case.sm_scale, backend="cpu")
    )


def test_what_is_refused_by_declaration() -> None:
    cpu = torch.device("cpu")
    case = floats([(1, 1)], torch.bfloat16, dim=8)
    assert unsupported(cpu, pages=case.pages, q=case.q) is None
    assert "float16" in str(unsupported(cpu, pages=rounded(case.pages, torch.float16)))
