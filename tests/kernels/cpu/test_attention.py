"""attention in C++: close to the oracle, and to the bit blind to batch, chunks and threads."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.test_attention import Case, lengths, make_case
from qoq.kernels.attention import attention_oracle
from qoq.kernels.cpu.attention import attention, unsupported

pytestmark = pytest.mark.usefixtures("variant")

BITS = list(itertools.product((4, 8), repeat=2))


def run(case: Case) -> torch.Tensor:
    arguments = (case.q, case.pages, case.page_table, case.kv_lens, case.cu_seqlens_q)
    return attention(*arguments, case.sm_scale, case.window)


def oracle(case: Case) -> torch.Tensor:
    arguments = (case.q, case.pages, case.page_table, case.kv_lens, case.cu_seqlens_q)
    return attention_oracle(*arguments, case.sm_scale, case.window)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within 1e-3 of the largest output: queries and probabilities have 16 bits."""
    assert got.shape == want.shape
    if want.numel():
        assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(lengths, max_size=4),
    bits=st.sampled_from(BITS),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1), (6, 2), (40, 1)]),
    dim=st.sampled_from([8, 24, 64, 80]),
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
    assert_close(run(case), oracle(case))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_segments_and_spans(bits: tuple[int, int], dim: int, window: int | None) -> None:
    # Lengths around the segments of 256 keys and the spans of 2048.
    lens = [(1, 255), (2, 256), (1, 257), (40, 600), (1, 2047), (3, 2049), (1, 4500)]
    case = make_case(lens, bits=bits, heads=(4, 2), dim=dim, page_size=16, window=window)
    assert_close(run(case), oracle(case))


def test_one_long_sequence_is_split_without_a_trace() -> None:
    """Alone, a long sequence's spans go to several threads; in a batch they do not."""
    case = make_case([(1, 9000)] + [(1, 20)] * 9, heads=(2, 1), dim=64, page_size=64)
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


@pytest.mark.parametrize("window", [None, 70])
def test_chunks_and_batches_change_no_bit(window: int | None) -> None:
    case = make_case([(300, 300)], heads=(6, 2), dim=64, page_size=16, window=window)
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


def test_poison_that_nobody_sees_is_not_read() -> None:
    case = make_case([(3, 600), (1, 5)], bits=(4, 8), dim=64, page_size=4, window=10)
    want = run(case)
    seen = {int(case.page_table[0, i]) for i in range(587 // 4, 150)}
    seen |= {int(page) for page in case.page_table[1, :2]}
    others = [p for p in range(case.pages.num_pages) if p not in seen]
    for tensor in (case.pages.k_scale, case.pages.v_scale, case.pages.v_offset):
        tensor[others] = torch.nan
    case.page_table[0, : 587 // 4] = 10**6  # freed long ago
    assert torch.equal(run(case), want)


def test_rows_that_are_no_numbers_stay_alone() -> None:
    case = make_case([(4, 40)], heads=(2, 1), dim=64)
    want = run(case)
    case.q[1, 0, 5], case.q[2, 1, 0] = torch.nan, torch.inf
    got = run(case)
    assert got[1, 0].isnan().all()
    assert got[2, 1].isnan().all()
    keep = torch.ones(4, 2, dtype=torch.bool)
    keep[1, 0] = keep[2, 1] = False
    assert torch.equal(got[keep], want[keep])


def test_sharp_scores_stay_close() -> None:
    """Scores so large that single keys win: an error of 2e-5 of them begins to count."""
    case = make_case([(3, 500)], dim=128)
    case.q.mul_(30)
    got, want = run(case), oracle(case)
    assert float((got - want).abs().max()) <= 2e-2 * float(want.abs().max())


def test_a_missing_number_among_keys_is_not_lost() -> None:
    case = make_case([(1, 258)], bits=(4, 4), heads=(2, 1), dim=64, page_size=258, window=3)
    case.pages.k_offset[int(case.page_table[0, 0]), 0, 255] = torch.nan
    assert run(case).isnan().all()
    assert oracle(case).isnan().all()


def test_no_heads_and_no_window_are_refused() -> None:
    case = make_case([(1, 4)], dim=8)
    with pytest.raises(ValueError, match="share"):
        run(replace(case, q=case.q[:, :0]))
    with pytest.raises(ValueError, match="window"):
        run(replace(case, window=0))


def test_large_and_zero_queries() -> None:
    case = make_case([(6, 40)], dim=64)
    case.q[0] = 0
    case.q[1] *= 1e4
    case.q[2] *= 1e-30
    case.q[3] *= 1e-42
    got = run(case)
    assert got.isfinite().all()
    keep = [0, 2, 3, 4, 5]
    assert_close(got[keep], oracle(case)[keep])


def test_tables_that_lie_are_refused() -> None:
    case = make_case([(2, 10)], dim=8)
    wrong_page = case.page_table.clone()
    wrong_page[0, 0] = case.pages.num_pages
    for change in (
        {"page_table": wrong_page},
        {"kv_lens": torch.tensor([1], dtype=torch.int32)},
        {"kv_lens": torch.tensor([1000], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([1, 2], dtype=torch.int32)},
    ):
        with pytest.raises(ValueError, match=r"page|fit|span"):
            run(replace(case, **change))


def test_what_is_refused_by_declaration() -> None:
    cpu = torch.device("cpu")
    assert unsupported(cpu) is None
    case = make_case([(1, 1)], bits=(16, 4), dim=8)
    assert "keys of one" in str(unsupported(cpu, pages=case.pages))
    assert "head_dim 6" in str(unsupported(cpu, q=torch.zeros(1, 1, 6)))
