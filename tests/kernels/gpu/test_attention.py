"""attention in Triton: close to the oracle, and to the bit blind to batch, chunks and launch."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.test_attention import Case, lengths, make_case, vector
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat
from qoq.kernels.attention import attention_oracle
from qoq.kernels.dispatch import resolve
from qoq.kernels.gpu import attention as attention_module
from qoq.kernels.gpu.attention import Call, Plan, attention, choose, unsupported

pytestmark = pytest.mark.usefixtures("faithful")

BITS = list(itertools.product((4, 8), repeat=2))
CODES_ERROR, BF16_ERROR = 2e-3, 1e-2  # of the largest output
ONE, FOLDED, SPREAD = Plan(8, 1), Plan(16, 1), Plan(8, 3)


def to(pages: KVPages, *where: torch.device | torch.dtype) -> KVPages:
    """Pages on another device, or 16-bit halves in another dtype."""
    tensors = {n: t for n, t in vars(pages).items() if isinstance(t, Tensor)}
    if isinstance(where[0], torch.dtype):
        tensors = {n: t for n, t in tensors.items() if t.dtype == torch.float32}
    return replace(pages, **{n: t.to(*where) for n, t in tensors.items()})


def run(case: Case, device: torch.device, plan: Plan | None = None) -> Tensor:
    q, table, lens, starts = (
        x.to(device) for x in (case.q, case.page_table, case.kv_lens, case.cu_seqlens_q)
    )
    pages = to(case.pages, device)
    return attention(q, pages, table, lens, starts, case.sm_scale, case.window, plan=plan).cpu()


def oracle(case: Case) -> Tensor:
    arguments = (case.q, case.pages, case.page_table, case.kv_lens, case.cu_seqlens_q)
    return attention_oracle(*arguments, case.sm_scale, case.window)


def assert_close(got: Tensor, want: Tensor, error: float = CODES_ERROR) -> None:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    if want.numel():
        assert float((got - want).abs().max()) <= error * float(want.abs().max())


def part(case: Case, start: int, stop: int) -> Case:
    """Rows start..stop of a case of one sequence, as a chunk of it."""
    return replace(
        case,
        q=case.q[start:stop],
        kv_lens=torch.tensor([stop], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, stop - start], dtype=torch.int32),
    )


# (bits, query heads, KV heads, dim, page size, plan): a kernel each, which takes a GPU time.
KERNELS = [
    ((4, 4), 4, 2, 64, 64, None),
    ((4, 4), 1, 1, 24, 16, SPREAD),
    ((8, 8), 7, 1, 80, 64, FOLDED),
    ((8, 8), 2, 2, 8, 16, ONE),
    ((8, 4), 12, 2, 64, 16, ONE),
    ((8, 4), 18, 1, 24, 64, SPREAD),
    ((4, 8), 3, 1, 8, 64, FOLDED),
    ((4, 8), 18, 1, 80, 16, None),
]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kernel=st.sampled_from(KERNELS),
    lens=st.lists(lengths, max_size=3),
    window=st.sampled_from([None, None, 1, 2, 5, 100]),
    padding=st.integers(0, 2),
)
def test_ragged_batches(
    device: torch.device,
    kernel: tuple[tuple[int, int], int, int, int, int, Plan | None],
    lens: list[tuple[int, int]],
    window: int | None,
    padding: int,
) -> None:
    bits, hq, hkv, dim, page_size, plan = kernel
    case = make_case(lens, bits=bits, heads=(hq, hkv), dim=dim, page_size=page_size, window=window)
    case.q = torch.cat((case.q, torch.randn(padding, *case.q.shape[1:])))
    got = run(case, device, plan)
    assert_close(got, oracle(case))
    assert got[len(got) - padding :].eq(0).all()


@pytest.mark.parametrize("bits", [(4, 4), (8, 4)])
@pytest.mark.parametrize("window", [None, 300])
def test_steps_and_splits(bits: tuple[int, int], window: int | None, device: torch.device) -> None:
    # Lengths around the steps of 64 and the splits of 256 tokens.
    lens = [(1, 63), (2, 65), (1, 255), (1, 256), (2, 257), (5, 520)]
    case = make_case(lens, bits=bits, heads=(2, 1), dim=64, page_size=64, window=window)
    assert_close(run(case, device), oracle(case))


@pytest.mark.parametrize(
    ("bits", "dim"), [((4, 8), 32), ((8, 4), 96), ((4, 4), 128), ((8, 8), 128), ((4, 8), 256)]
)
def test_head_dims(bits: tuple[int, int], dim: int, device: torch.device) -> None:
    case = make_case([(3, 70), (1, 40)], bits=bits, heads=(2, 1), dim=dim, page_size=64)
    assert_close(run(case, device), oracle(case))


@pytest.mark.parametrize("page_size", [16, 32, 48, 128])
def test_page_sizes(page_size: int, device: torch.device) -> None:
    case = make_case([(2, 2 * page_size + 1), (1, page_size)], dim=64, page_size=page_size)
    assert_close(run(case, device), oracle(case))


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        ((16, 16), torch.bfloat16),
        ((16, 16), torch.float16),
        ((16, 4), torch.bfloat16),
        ((8, 16), torch.float16),
    ],
)
def test_float_pages(bits: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    lens = [(5, 70), (1, 300), (0, 3)]
    case = make_case(lens, bits=bits, heads=(4, 2), dim=64, page_size=64, window=280)
    case.pages = to(case.pages, dtype)
    assert_close(
        run(case, device),
        oracle(case),
        BF16_ERROR if dtype == torch.bfloat16 else CODES_ERROR,
    )


@pytest.mark.parametrize("bits", BITS)
def test_both_ways_to_make_operands_of_codes_agree_to_the_bit(
    bits: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([(3, 90), (1, 300)], bits=bits, dim=64, page_size=64)
    want = run(case, device)
    monkeypatch.setattr(attention_module, "SUBNORMAL", not attention_module.SUBNORMAL)
    assert torch.equal(run(case, device), want)


@pytest.mark.parametrize(("bits", "window"), [((4, 4), None), ((8, 4), 70), ((16, 8), 258)])
def test_a_row_knows_neither_its_chunk_nor_the_launch(
    bits: tuple[int, int], window: int | None, device: torch.device
) -> None:
    """To the bit, wherever a prompt is cut and however tiles and splits are shared out."""
    total = 300 if device.type == "cpu" else 1500
    whole = make_case(
        [(total, total)], bits=bits, heads=(3, 1), dim=64, page_size=64, window=window
    )
    whole.pages = to(whole.pages, torch.bfloat16)
    for start, stop in ((0, 3), (62, 66), (255, 258), (total - 4, total)):
        chunk = part(whole, start, stop)
        want = run(chunk, device, FOLDED)
        assert_close(want, oracle(chunk), BF16_ERROR)
        assert torch.equal(run(chunk, device, SPREAD), want)
        for row in (start, stop - 1):
            assert torch.equal(run(part(whole, row, row + 1), device, ONE)[0], want[row - start])


@pytest.mark.parametrize("window", [None, 6])
def test_a_sequence_does_not_know_its_batch(window: int | None, device: torch.device) -> None:
    lens = [(9, 90), (1, 33), (0, 5), (4, 4), (1, 260)]
    case = make_case(lens, heads=(2, 1), dim=64, page_size=64, window=window)
    together = run(case, device)
    cu = case.cu_seqlens_q.tolist()
    for s in range(len(lens)):
        alone = replace(
            case,
            q=case.q[cu[s] : cu[s + 1]],
            page_table=case.page_table[s : s + 1],
            kv_lens=case.kv_lens[s : s + 1],
            cu_seqlens_q=torch.tensor([0, cu[s + 1] - cu[s]]),
        )
        assert torch.equal(run(alone, device), together[cu[s] : cu[s + 1]])


@pytest.mark.parametrize("bits", [(4, 8), (16, 16)])
@pytest.mark.parametrize("window", [None, 3])
def test_nothing_but_visible_keys_is_read(
    bits: tuple[int, int], window: int | None, device: torch.device
) -> None:
    case = make_case([(2, 70), (1, 33)], bits=bits, heads=(2, 2), page_size=16, window=window)
    case.pages = to(case.pages, torch.float16)
    want = run(case, device)
    seen = torch.zeros(case.pages.num_pages, 16, dtype=torch.bool)
    for s, (row, kv_len) in enumerate(((68, 70), (32, 33))):
        for j in range(0 if window is None else row - window + 1, kv_len):
            seen[int(case.page_table[s, j // 16]), j % 16] = True
    for tensor in vars(case.pages).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            tensor.transpose(1, 2)[~seen] = torch.nan
    for s, kv_len in enumerate((70, 33)):
        case.page_table[s, -(-kv_len // 16) :] = 1 << 30  # past the sequence: not even a page
    assert torch.equal(run(case, device), want)


def test_one_key_gives_its_value(device: torch.device) -> None:
    case = make_case([(1, 1)], bits=(8, 8), heads=(3, 1), page_size=16)
    want = torch.tensor(vector(case.pages, "v", int(case.page_table[0, 0]), 0, 0))
    torch.testing.assert_close(run(case, device)[0], want.expand(3, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 30.0, 1e15])
def test_queries_of_any_size(size: float, device: torch.device) -> None:
    case = make_case([(6, 100)], bits=(8, 8), dim=64, page_size=16)
    case.q *= size
    got = run(case, device)
    assert got.isfinite().all()
    if size < 1e15:  # whose softmax picks a key that rounding may choose
        assert_close(got, oracle(case), 5e-2 if size > 1 else CODES_ERROR)


@pytest.mark.parametrize("scale", [6e-8, 1e-4, 4000.0])
def test_values_of_any_size_behind_one_large_score(scale: float, device: torch.device) -> None:
    """One key has nearly all the weight; what thousands of others add is not lost in fp16."""
    tokens = 1000
    case = make_case([(1, tokens)], bits=(8, 4), heads=(1, 1), dim=16, page_size=64)
    pages = case.pages
    pages.k_codes.zero_()
    pages.k_scale.fill_(1.0)
    pages.k_offset.zero_()
    page, place = int(case.page_table[0, 3]), 7
    pages.k_codes[page, 0, place] = 1
    case.q = torch.full_like(case.q, 11.0)  # e^11: 60000 to 1 for that key, 3 % for the rest
    case.sm_scale = 1 / 16
    pages.v_scale.copy_(torch.rand(pages.v_scale.shape) + 0.5).mul_(scale)
    pages.v_offset.copy_(-8.0 * pages.v_scale)
    pages.v_codes.fill_(0xFF)  # 15, everywhere but at the large key
    pages.v_codes[page, 0, place] = 0x88  # 8: worth nothing
    got, want = run(case, device), oracle(case)
    assert float(want.abs().max()) > 0.05 * scale
    assert_close(got, want, 1e-2)


def test_a_bad_number_stays_in_its_sequence_and_is_seen(device: torch.device) -> None:
    case = make_case([(2, 70), (3, 80)], dim=64, page_size=16)
    want = run(case, device)
    case.q[0, 1, 5] = torch.nan
    got = run(case, device)
    assert got[0, 1].isnan().all()
    got[0, 1] = want[0, 1]
    assert torch.equal(got, want)


def test_half_queries_views_and_empty_calls(device: torch.device) -> None:
    case = make_case([(4, 6)], page_size=16)
    case.q = case.q.half()
    want = run(replace(case, q=case.q.float()), device)
    assert torch.equal(run(case, device), want)
    wide = torch.randn(4, 9, 8)
    wide[:, 2:6] = case.q
    assert torch.equal(run(replace(case, q=wide[:, 2:6]), device), want)
    nobody = make_case([], page_size=16)
    assert run(nobody, device).shape == (0, 4, 8)
    nobody.q = torch.randn(3, 4, 8)
    assert run(nobody, device).eq(0).all()


def test_lengths_that_do_not_fit_harm_nobody_else(device: torch.device) -> None:
    case = make_case([(2, 30), (4, 33), (1, 5)], dim=64, page_size=16)
    want = run(case, device)
    for wrong in (3, 10_000):
        case.kv_lens[1] = wrong
        got = run(case, device)
        assert torch.equal(got[:2], want[:2])
        assert torch.equal(got[6:], want[6:])


def test_refusals(device: torch.device) -> None:
    case = make_case([(4, 6)], page_size=16)
    with pytest.raises(ValueError, match="do not share"):
        run(replace(case, q=case.q[:, :3]), device)
    with pytest.raises(ValueError, match="nothing to see"):
        run(replace(case, window=0), device)
    with pytest.raises(ValueError, match=r"kv_lens \[1\]"):
        run(replace(case, kv_lens=torch.tensor([6, 6])), device)
    pages = replace(case.pages, k_codes=case.pages.k_codes.repeat(2, 1, 1, 1)[::2])
    with pytest.raises(ValueError, match="contiguous"):
        run(replace(case, pages=pages), device)


def test_what_it_declares() -> None:
    cuda = torch.device("cuda", 0)

    def pages(bits: int, size: int, dtype: torch.dtype = torch.bfloat16) -> KVPages:
        return KVPages.empty(KVFormat(bits, bits), 1, 1, size, 64, dtype=dtype)

    assert "float32" in str(unsupported(cuda, pages=pages(16, 16, torch.float32)))
    assert "multiple of 16" in str(unsupported(cuda, pages=pages(4, 24)))
    assert "head_dim 260" in str(unsupported(cuda, q=torch.empty(1, 1, 260)))
    assert "head_dim 12" in str(unsupported(cuda, q=torch.empty(1, 1, 12)))
    on_cpu = unsupported(torch.device("cpu"), pages=pages(16, 16), q=torch.empty(1, 1, 64))
    assert "CUDA" in str(on_cpu)
    assert resolve("attention", "auto", torch.device("cpu")) is not attention


def call(rows: int, sequences: int, **changed: int) -> Call:
    model = {"heads": 32, "kv_heads": 8, "dim": 128, "page_size": 64, "max_pages": 512, "window": 0}
    return Call(rows, sequences, **(model | changed))


def test_plans_keep_the_gpu_busy() -> None:
    # Decode: one row each. The fewer sequences there are, the more programs share one.
    turns = [choose(call(n, n), 132).turns for n in (1, 4, 16, 64, 128, 256)]
    assert turns == sorted(turns, reverse=True)
    assert (turns[0], turns[-1]) == (128, 1)
    assert {choose(call(n, n), 132).columns for n in (1, 16, 256)} == {8}
    # Prompts: wide tiles, and nothing to share out once there are enough of them.
    assert choose(call(4096, 1), 132) == Plan(16, 1)
    assert choose(call(64, 1), 132) == Plan(16, 9)
    assert choose(call(4096, 1, dim=256), 132).columns == 8  # registers
    assert choose(call(1, 1, heads=96), 132).columns == 16  # 12 heads share a KV head


def test_plans_bound_what_is_left_unfinished() -> None:
    assert choose(call(1, 1, window=4096), 132).turns == Plan(8, 1).slots(call(1, 1, window=4096))
    for rows, sequences, pages in ((64, 1, 512), (64, 64, 16384), (1, 1, 1 << 20)):
        shape = call(rows, sequences, max_pages=pages)
        plan = choose(shape, 132)
        assert plan.turns == 1 or plan.slots(shape) * rows * 32 * 130 * 4 <= 1 << 29


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("window", [1, 2, 255, 256, 257, 300])
def test_slots_hold_every_split_a_tile_sees(rows: int, window: int) -> None:
    plan, split = Plan(8, 2), attention_module.SPLIT
    shape = call(8, 1, heads=8 * (8 // rows), window=window)
    assert plan.tile_rows(shape) == rows
    most = 0
    for first in range(600):
        low, high = max(0, first - window + 1), first + rows
        most = max(most, -(-high // split) - low // split)
    assert most <= plan.slots(shape) <= most + 1
