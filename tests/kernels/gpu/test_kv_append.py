"""kv_append in Triton against its oracle: the queries and every byte of the pages."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpu.test_kv_append import (
    SPECIAL,
    angles,
    copy,
    garbage,
    same_pages,
    some_slots,
    vectors,
)
from qoq.formats.hadamard import hadamard_matrix
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat
from qoq.kernels.dispatch import resolve
from qoq.kernels.gpu.kv_append import kv_append, unsupported
from qoq.kernels.kv_append import kv_append_oracle

pytestmark = pytest.mark.usefixtures("faithful")

BITS = list(itertools.product((4, 8, 16), repeat=2))


def twin(
    device: torch.device, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, pages: KVPages
) -> Tensor:
    """The twin's queries; its pages are written into ``pages``, which lie on the CPU."""
    here = replace(
        pages, **{n: t.to(device) for n, t in vars(pages).items() if isinstance(t, Tensor)}
    )
    cos, sin, slots, *options = (None if t is None else t.to(device) for t in rest)
    out = kv_append(*(x.to(device) for x in (q, k, v)), cos, sin, slots, here, *options)
    for name, tensor in vars(here).items():
        if isinstance(tensor, Tensor):
            getattr(pages, name).copy_(tensor)
    return out.cpu()


def compare(
    device: torch.device, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None, pages: KVPages
) -> None:
    """The twin and the oracle on copies of the same pages."""
    cos, sin, slots, *options = rest
    want_pages = copy(pages)
    inputs = [x.clone() for x in (q, k, v)]
    want = kv_append_oracle(q, k, v, cos, sin, slots, want_pages, *options)
    got = twin(device, q, k, v, *rest, pages=pages)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    if len(options) == 2 and options[1] is not None:
        # A sum in fp64 may lie within its own error of where fp32 rounds the other way.
        torch.testing.assert_close(got, want, rtol=2.5e-7, atol=1e-12)
        assert (got != want).sum() <= 1
    else:
        assert torch.equal(got, want)
    same_pages(pages, want_pages)
    for before, after in zip(inputs, (q, k, v), strict=True):
        assert torch.equal(before, after)


# (bits, query heads, KV heads, dim, rotary pairs, page size, float pages, rotated)
KERNELS = [
    ((4, 4), 4, 2, 64, 32, 16, None, False),
    ((4, 4), 6, 2, 46, 11, 4, None, True),
    ((8, 8), 9, 1, 256, 128, 1, None, False),
    ((8, 4), 3, 3, 6, 1, 4, None, True),
    ((4, 8), 1, 1, 10, 5, 1, None, False),
    ((16, 16), 4, 2, 80, 40, 16, torch.bfloat16, False),
    ((16, 16), 1, 1, 2, 1, 4, torch.float32, True),
    ((16, 4), 6, 2, 96, 24, 16, torch.float16, False),
    ((8, 16), 3, 3, 128, 32, 1, torch.bfloat16, True),
]


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    kernel=st.sampled_from(KERNELS),
    t=st.integers(0, 9),
    fused=st.booleans(),
    centered=st.booleans(),
    data=st.data(),
)
def test_pages_and_queries_are_the_oracles(
    device: torch.device,
    kernel: tuple[tuple[int, int], int, int, int, int, int, torch.dtype | None, bool],
    t: int,
    fused: bool,
    centered: bool,
    data: st.DataObject,
) -> None:
    bits, hq, hkv, d, pairs, page_size, dtype, rotated = kernel
    num_pages = -(-12 // page_size)
    pages = garbage(bits, num_pages, hkv, page_size, d)
    for name in ("k_codes", "v_codes"):
        if getattr(pages, name).dtype == torch.float32:
            pages = replace(pages, **{name: getattr(pages, name).to(dtype)})
    slots = data.draw(some_slots(t, num_pages * page_size))
    q, k, v = vectors(t, hq, hkv, d, fused=fused)
    center = torch.randn(hkv, d) * 4 if centered else None
    rotation = torch.linalg.qr(torch.randn(d, d))[0] if rotated else None
    compare(device, q, k, v, *angles(t, pairs), slots, center, rotation, pages=pages)


@pytest.mark.parametrize("d", [64, 128])
def test_hadamard_rotation_at_model_size(d: int, device: torch.device) -> None:
    t, slots = 20, torch.randperm(32)[:20]
    q, k, v = torch.randn(t, 4, d), torch.randn(t, 2, d) * 5, torch.randn(t, 2, d)
    pages = garbage((4, 4), 2, 2, 16, d)
    rotation = hadamard_matrix(d).float()
    compare(device, q, k, v, *angles(t, d // 2), slots, torch.randn(2, d), rotation, pages=pages)


def test_a_float64_rotation_is_not_rounded(device: torch.device) -> None:
    q, rotation = torch.randn(2, 1, 8), torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    pages = garbage((8, 8), 1, 1, 2, 8)
    compare(device, q, q, q, *angles(2, 4), torch.arange(2), None, rotation, pages=pages)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_and_offsets_round_like_fp16(bits: int, device: torch.device) -> None:
    # Offsets from vectors that start anywhere among the floats, scales from their ranges.
    t = 1500
    low = torch.randint(-(1 << 31), 1 << 31, (t,), dtype=torch.int64).to(torch.int32)
    low = low.view(torch.float32).nan_to_num(1.0, 1.0, 1.0)
    near = torch.randn(t) * 2.0 ** torch.randint(-28, 18, (t,))  # where fp16 has its numbers
    low = torch.where(torch.rand(t) < 0.3, low, near)
    v = torch.stack((low, low, low + torch.rand(t) * 2.0 ** torch.randint(-20, 20, (t,))), dim=1)
    v = torch.cat((v, v[:, :1]), dim=1)[:, None]
    pages = garbage((bits, bits), -(-t // 16), 1, 16, 4)
    still = torch.ones(t, 1), torch.zeros(t, 1)
    compare(device, v, -v, v, *still, torch.arange(t), pages=pages)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_between_two_levels_round_to_even(bits: int, device: torch.device) -> None:
    # Every half code, exactly: range 2^bits - 1, scale 1.
    levels = 2**bits - 1
    v = torch.arange(2 * levels + 2).clamp(max=2 * levels).div(2).expand(3, 1, -1).contiguous()
    pages = garbage((bits, bits), 1, 1, 4, v.shape[2])
    still = torch.ones(3, 1), torch.zeros(3, 1)
    compare(device, v, v, v, *still, torch.arange(3), pages=pages)


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (16, 16)])
def test_constant_huge_and_tiny_vectors(bits: tuple[int, int], device: torch.device) -> None:
    d = 34
    pairs = list(itertools.product(SPECIAL, repeat=2))
    v = torch.empty(len(pairs), 1, d)
    for i, (first, second) in enumerate(pairs):
        v[i, 0, ::2], v[i, 0, 1::2] = first, second
    pages = garbage(bits, len(pairs), 1, 1, d)
    still = torch.ones(len(pairs), 1), torch.zeros(len(pairs), 1)
    compare(device, v, v, v, *still, torch.arange(len(pairs)), pages=pages)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_spoils_its_own_vector_only(bad: float, device: torch.device) -> None:
    k, v = torch.randn(3, 2, 34), torch.randn(3, 2, 34)
    v[1, 1, 5] = bad
    want = garbage((8, 4), 1, 2, 4, 34)
    got = copy(want)
    rest = (*angles(3, 17), torch.arange(3))
    kv_append_oracle(k, k, v, *rest, want)
    twin(device, k, k, v, *rest, pages=got)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    want.v_codes[0, :, :3][~others] = got.v_codes[0, :, :3][~others]  # they mean nothing
    same_pages(got, want)


def test_a_token_does_not_know_its_chunk(device: torch.device) -> None:
    t, d = 40, 64
    q, k, v = torch.randn(t, 6, d), torch.randn(t, 2, d), torch.randn(t, 2, d)
    cos, sin = angles(t, d // 2)
    rest, slots = (torch.randn(2, d), hadamard_matrix(d).float()), torch.arange(t)
    whole, parts = (KVPages.empty(KVFormat(4, 8), 3, 2, 16, d) for _ in range(2))
    want = twin(device, q, k, v, cos, sin, slots, *rest, pages=whole)
    for start, stop in itertools.pairwise((0, 1, 19, 39, 40)):
        c = slice(start, stop)
        got = twin(device, q[c], k[c], v[c], cos[c], sin[c], slots[c], *rest, pages=parts)
        assert torch.equal(got, want[c])
    same_pages(parts, whole)


def test_blocks_of_tokens_make_no_difference(device: torch.device) -> None:
    t, d = 257, 8  # a block of 16 tokens at a time, where 60 at once go by 4
    q, k, v = torch.randn(t, 2, d), torch.randn(t, 1, d), torch.randn(t, 1, d)
    cos, sin = angles(t, d // 2)
    whole, parts = (KVPages.empty(KVFormat(4, 4), 17, 1, 16, d) for _ in range(2))
    want = twin(device, q, k, v, cos, sin, torch.arange(t), pages=whole)
    for start in range(0, t, 60):
        c = slice(start, min(t, start + 60))
        slots = torch.arange(c.start, c.stop)
        got = twin(device, q[c], k[c], v[c], cos[c], sin[c], slots, pages=parts)
        assert torch.equal(got, want[c])
    same_pages(parts, whole)


def test_slots_outside_the_pages_write_nothing(device: torch.device) -> None:
    q, (cos, sin) = torch.randn(4, 1, 8), angles(4, 4)
    pages = garbage((4, 8), 2, 1, 4, 8)
    want = copy(pages)
    slots = torch.tensor([3, 8, 1 << 40, -7])
    twin(device, q, q, q, cos, sin, slots, pages=pages)
    kv_append_oracle(q[:1], q[:1], q[:1], cos[:1], sin[:1], slots[:1], want)
    same_pages(pages, want)


def test_refusals_write_nothing(device: torch.device) -> None:
    q, k, (cos, sin) = torch.randn(3, 2, 4), torch.randn(3, 1, 4), angles(3, 2)
    pages = garbage((4, 8), 2, 1, 4, 4)
    before, slots = copy(pages), torch.arange(3)
    with pytest.raises(ValueError, match="head_dim 4"):
        twin(device, q, k, k, *angles(3, 3), slots, pages=pages)
    with pytest.raises(ValueError, match=r"sin must be \[3, 2\]"):
        twin(device, q, k, k, cos, sin[:2], slots, pages=pages)
    with pytest.raises(ValueError, match=r"slots must be \[3\]"):
        twin(device, q, k, k, cos, sin, slots[:2], pages=pages)
    with pytest.raises(ValueError, match=r"v must be \[3, 1, 4\]"):
        twin(device, q, k, k[:, :, :2], cos, sin, slots, pages=pages)
    with pytest.raises(ValueError, match=r"k_center must be \[1, 4\]"):
        twin(device, q, k, k, cos, sin, slots, torch.ones(2, 4), pages=pages)
    with pytest.raises(ValueError, match=r"k_rotation must be \[4, 4\]"):
        twin(device, q, k, k, cos, sin, slots, None, torch.eye(3), pages=pages)
    with pytest.raises(ValueError, match="even"):
        twin(device, q[..., :3], k[..., :3], k[..., :3], *angles(3, 1), slots, pages=pages)
    every_other = replace(pages, k_codes=pages.k_codes.repeat(2, 1, 1, 1)[::2])
    with pytest.raises(ValueError, match="contiguous"):
        kv_append(q, k, k, cos, sin, slots, every_other)
    same_pages(pages, before)


def test_what_it_declares() -> None:
    half = KVPages.empty(KVFormat(4, 16), 1, 1, 1, 4, dtype=torch.float64)
    assert "float64" in str(unsupported(torch.device("cuda", 0), pages=half))
    assert "CUDA" in str(unsupported(torch.device("cpu"), pages=garbage((4, 16), 1, 1, 1, 4)))
    assert resolve("kv_append", "auto", torch.device("cpu")) is not kv_append
