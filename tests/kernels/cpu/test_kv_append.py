"""C++ kv_append against its oracle: the queries and every byte of the pages."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.hadamard import hadamard_matrix
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat
from qoq.kernels.cpu.kv_append import kv_append, unsupported
from qoq.kernels.kv_append import kv_append_oracle

BITS = list(itertools.product((4, 8, 16), repeat=2))

pytestmark = pytest.mark.usefixtures("variant")


def angles(t: int, r: int) -> tuple[Tensor, Tensor]:
    theta = torch.rand(t, r) * 20
    return theta.cos(), theta.sin()


def garbage(bits: tuple[int, int], pages: int, heads: int, size: int, dim: int) -> KVPages:
    """Pages full of what no kernel writes by chance."""
    out = KVPages.empty(KVFormat(*bits), pages, heads, size, dim)
    for tensor in vars(out).values():
        if isinstance(tensor, Tensor):
            tensor.copy_(torch.randint(1, 255, tensor.shape))
    return out


def copy(pages: KVPages) -> KVPages:
    tensors = {n: t.clone() for n, t in vars(pages).items() if isinstance(t, Tensor)}
    return replace(pages, **tensors)


def same_pages(got: KVPages, want: KVPages) -> None:
    for name, tensor in vars(want).items():
        if isinstance(tensor, Tensor):
            torch.testing.assert_close(
                getattr(got, name), tensor, rtol=0, atol=0, equal_nan=True, msg=name
            )


def compare(q: Tensor, k: Tensor, v: Tensor, *rest: object, pages: KVPages) -> None:
    """The twin and the oracle on copies of the same pages."""
    cos, sin, slots, *options = rest
    want_pages = copy(pages)
    inputs = [x.clone() for x in (q, k, v)]
    want = kv_append_oracle(q, k, v, cos, sin, slots, want_pages, *options)  # type: ignore[arg-type]
    got = kv_append(q, k, v, cos, sin, slots, pages, *options)  # type: ignore[arg-type]
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    if len(options) == 2:
        # A sum in fp64 may lie within its own error of where fp32 rounds the other way.
        torch.testing.assert_close(got, want, rtol=2.5e-7, atol=1e-12)
        assert (got != want).sum() <= 1
    else:
        assert torch.equal(got, want)
    same_pages(pages, want_pages)
    for before, after in zip(inputs, (q, k, v), strict=True):
        assert torch.equal(before, after)


def vectors(t: int, hq: int, hkv: int, d: int, *, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of t tokens; fused: as the model does, three views of one matrix."""
    if fused:
        qkv = torch.randn(t, (hq + 2 * hkv) * d) * 3 + 1
        q, k, v = (x.unflatten(1, (-1, d)) for x in qkv.split([hq * d, hkv * d, hkv * d], dim=1))
        return q, k, v
    return (
        torch.randn(t, hq, d),
        torch.randn(d, hkv, t).permute(2, 1, 0),
        torch.randn(t, hkv, d).half(),
    )


@st.composite
def some_slots(draw: st.DrawFn, t: int, room: int) -> Tensor:
    """int64 [t]: different slots of ``room``, and -1 for padding."""
    slots = draw(st.lists(st.integers(0, room - 1), min_size=t, max_size=t, unique=True))
    padding = draw(st.lists(st.booleans(), min_size=t, max_size=t))
    chosen = [-1 if pad else slot for slot, pad in zip(slots, padding, strict=True)]
    return torch.tensor(chosen, dtype=torch.int64)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    bits=st.sampled_from(BITS),
    t=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3), (9, 1), (10, 5)]),
    d=st.sampled_from([2, 6, 10, 32, 46, 64, 66, 80, 96, 128, 200, 256]),
    part=st.sampled_from([1, 2, 3]),
    page_size=st.sampled_from([1, 4, 16]),
    fused=st.booleans(),
    centered=st.booleans(),
    rotated=st.booleans(),
    data=st.data(),
)
def test_pages_and_queries_are_the_oracles(
    bits: tuple[int, int],
    t: int,
    heads: tuple[int, int],
    d: int,
    part: int,
    page_size: int,
    fused: bool,
    centered: bool,
    rotated: bool,
    data: st.DataObject,
) -> None:
    hq, hkv = heads
    num_pages = -(-12 // page_size)
    pages = garbage(bits, num_pages, hkv, page_size, d)
    slots = data.draw(some_slots(t, num_pages * page_size))
    q, k, v = vectors(t, hq, hkv, d, fused=fused)
    options: list[Tensor | None] = [torch.randn(hkv, d) * 4 if centered else None]
    if rotated:
        options.append(torch.linalg.qr(torch.randn(d, d))[0])
    compare(q, k, v, *angles(t, d // 2 // part), slots, *options, pages=pages)


def test_bf16_pages_round_to_nearest_even() -> None:
    # Any bits at all, and every tie: bf16 numbers with a half of their last bit.
    t, d = 4000, 18
    v = torch.randint(-(1 << 31), 1 << 31, (t, 2, d)).to(torch.int32)
    v[::2] = v[::2] & -65536 | 0x8000
    numbers = v.view(torch.float32)
    pages = KVPages.empty(KVFormat(16, 16), -(-t // 16), 2, 16, d, dtype=torch.bfloat16)
    cos, sin = torch.ones(t, 1), torch.zeros(t, 1)
    k = torch.randn(t, 2, d)
    kv_append(k, k, numbers, cos, sin, torch.arange(t), pages)
    got = pages.v_codes.transpose(1, 2).flatten(0, 1)[:t]
    want = numbers.bfloat16()
    assert torch.equal(got.isnan(), numbers.isnan())
    assert torch.equal(got.view(torch.int16)[~got.isnan()], want.view(torch.int16)[~got.isnan()])
    assert torch.equal(pages.k_codes.transpose(1, 2).flatten(0, 1)[:t], k.bfloat16())


@pytest.mark.parametrize("d", [64, 128])
def test_hadamard_rotation_at_model_size(d: int) -> None:
    t, slots = 40, torch.randperm(64)[:40]
    q, k, v = torch.randn(t, 8, d), torch.randn(t, 2, d) * 5, torch.randn(t, 2, d)
    rotation = hadamard_matrix(d).float()
    pages = garbage((4, 4), 4, 2, 16, d)
    compare(q, k, v, *angles(t, d // 2), slots, torch.randn(2, d), rotation, pages=pages)


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_and_offsets_round_like_fp16(bits: int) -> None:
    # Offsets from vectors that start anywhere among the floats, scales from their ranges.
    t = 20_000
    low = torch.randint(-(1 << 31), 1 << 31, (t,), dtype=torch.int64).to(torch.int32)
    low = low.view(torch.float32).nan_to_num(1.0, 1.0, 1.0)
    near = torch.randn(t) * 2.0 ** torch.randint(-28, 18, (t,))  # where fp16 has its numbers
    low = torch.where(torch.rand(t) < 0.3, low, near)
    v = torch.stack((low, low, low + torch.rand(t) * 2.0 ** torch.randint(-20, 20, (t,))), dim=1)
    v = torch.cat((v, v[:, :1]), dim=1)[:, None]
    pages = garbage((bits, bits), -(-t // 16), 1, 16, 4)
    compare(v, -v, v, torch.ones(t, 1), torch.zeros(t, 1), torch.arange(t), pages=pages)


SPECIAL = [0.0, -0.0, 1.0, 1e-8, -6e-8, 1e-45, 65504.0, 65520.0, -7e4, 1e30, -3e38]


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (16, 16)])
def test_constant_huge_and_tiny_vectors(bits: tuple[int, int]) -> None:
    d = 34
    pairs = list(itertools.product(SPECIAL, repeat=2))
    v = torch.empty(len(pairs), 1, d)
    for i, (first, second) in enumerate(pairs):
        v[i, 0, ::2], v[i, 0, 1::2] = first, second
    pages = garbage(bits, len(pairs), 1, 1, d)
    cos, sin = torch.ones(len(pairs), 1), torch.zeros(len(pairs), 1)
    compare(v, v, v, cos, sin, torch.arange(len(pairs)), pages=pages)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 5, 33])
def test_a_bad_number_spoils_its_own_vector_only(bad: float, place: int) -> None:
    v = torch.randn(3, 2, 34)
    v[1, 1, place] = bad
    want, got = (garbage((8, 4), 1, 2, 4, 34) for _ in range(2))
    k = torch.randn(3, 2, 34)
    rest = (k, v, *angles(3, 17), torch.arange(3))
    kv_append_oracle(k, *rest, want)
    kv_append(k, *rest, got)
    for name in ("v_scale", "v_offset"):
        torch.testing.assert_close(
            getattr(got, name)[:, :, :3],
            getattr(want, name)[:, :, :3],
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    assert torch.equal(got.v_codes[0, :, :3][others], want.v_codes[0, :, :3][others])
    assert torch.equal(got.k_codes[0, :, :3], want.k_codes[0, :, :3])


def test_a_token_does_not_know_its_chunk() -> None:
    t, d = 50, 64
    q, k, v = torch.randn(t, 6, d), torch.randn(t, 2, d), torch.randn(t, 2, d)
    cos, sin = angles(t, d // 2)
    rest, slots = (torch.randn(2, d), hadamard_matrix(d).float()), torch.arange(t)
    whole, parts = (KVPages.empty(KVFormat(4, 8), 4, 2, 16, d) for _ in range(2))
    want = kv_append(q, k, v, cos, sin, slots, whole, *rest)
    for start, stop in itertools.pairwise((0, 1, 2, 19, 49, 50)):
        c = slice(start, stop)
        got = kv_append(q[c], k[c], v[c], cos[c], sin[c], slots[c], parts, *rest)
        assert torch.equal(got, want[c])
    same_pages(parts, whole)


def test_refusals_write_nothing() -> None:
    q, k, (cos, sin) = torch.randn(3, 2, 4), torch.randn(3, 1, 4), angles(3, 2)
    pages = garbage((4, 8), 2, 1, 4, 4)
    before, slots = copy(pages), torch.tensor([0, 8, 1])
    with pytest.raises(IndexError, match="last page"):
        kv_append(q, k, k, cos, sin, slots, pages)
    slots = torch.arange(3)
    with pytest.raises(ValueError, match="head_dim 4"):
        kv_append(q, k, k, *angles(3, 3), slots, pages)
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        kv_append(q, k, k, cos, sin[:2], slots, pages)
    with pytest.raises(ValueError, match=r"\[3\]"):
        kv_append(q, k, k, cos, sin, slots[:2], pages)
    with pytest.raises(ValueError, match=r"\[3, 1, 4\]"):
        kv_append(q, k, k[:, :, :2], cos, sin, slots, pages)
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        kv_append(q, k, k, cos, sin, slots, pages, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"\[4, 4\]"):
        kv_append(q, k, k, cos, sin, slots, pages, None, torch.eye(3))
    every_other = replace(pages, k_codes=pages.k_codes.repeat(2, 1, 1, 1)[::2])
    with pytest.raises(ValueError, match="contiguous"):
        kv_append(q, k, k, cos, sin, slots, every_other)
    with pytest.raises(ValueError, match="even"):
        kv_append(q[..., :3], k[..., :3], k[..., :3], *angles(3, 1), slots, pages)
    same_pages(pages, before)


def test_what_it_declares() -> None:
    cpu = torch.device("cpu")
    assert unsupported(cpu) is None
    assert unsupported(cpu, pages=garbage((4, 16), 1, 1, 1, 4)) is None
    half = KVPages.empty(KVFormat(4, 16), 1, 1, 1, 4, dtype=torch.bfloat16)
    assert unsupported(cpu, pages=half) is None
    half = KVPages.empty(KVFormat(4, 16), 1, 1, 1, 4, dtype=torch.float16)
    assert "float16" in str(unsupported(cpu, pages=half))
    assert "CPU" in str(unsupported(torch.device("cuda")))


def test_a_float64_rotation_is_not_rounded() -> None:
    q, rotation = torch.randn(2, 1, 8), torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    pages = garbage((8, 8), 1, 1, 2, 8)
    compare(q, q, q, *angles(2, 4), torch.arange(2), None, rotation, pages=pages)
