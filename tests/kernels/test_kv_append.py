"""kv_append: RoPE by complex numbers, pages byte for byte, slots and padding."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.affine import affine_dequantize
from qoq.formats.hadamard import hadamard_matrix
from qoq.formats.kv import KVPages
from qoq.formats.packing import unpack_nibbles
from qoq.formats.scheme import KVFormat
from qoq.kernels.kv_append import apply_rope, kv_append

BITS = list(itertools.product((4, 8, 16), repeat=2))


def angles(t: int, r: int) -> tuple[Tensor, Tensor]:
    theta = torch.rand(t, r, dtype=torch.float64) * 20
    return theta.cos().float(), theta.sin().float()


def rope64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same turn in complex float64."""
    x, r = x.double(), cos.shape[-1]
    turned = torch.complex(x[..., :r], x[..., r : 2 * r])
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * r :]), dim=-1)


def read(pages: KVPages, side: str, slot: int) -> Tensor:
    """fp32 [Hkv, D] at a slot, page arithmetic done by hand."""
    page, offset = divmod(slot, pages.page_size)
    bits = getattr(pages.format, f"{side}_bits")
    codes = getattr(pages, f"{side}_codes")[page, :, offset]
    if bits == 16:
        return codes.float()
    codes = unpack_nibbles(codes) if bits == 4 else codes
    qparams = [getattr(pages, f"{side}_{n}")[page, :, offset] for n in ("scale", "offset")]
    return affine_dequantize(codes, *qparams)


def tolerance(x: Tensor, bits: int) -> Tensor:
    """How far a stored vector of x [..., D] may lie from it, per vector."""
    if bits == 16:
        return 1e-5 * (1 + x.abs().amax(-1, keepdim=True))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (high - low) * (0.5 / (2**bits - 1) + 2**-10) + low.abs() * 2**-10 + 1e-5


@pytest.mark.parametrize(
    ("t", "h", "d", "r"), [(1, 1, 2, 1), (5, 3, 8, 4), (4, 2, 10, 3), (0, 2, 4, 2)]
)
def test_rope(t: int, h: int, d: int, r: int) -> None:
    x, (cos, sin) = torch.randn(t, h, d), angles(t, r)
    got = apply_rope(x, cos, sin)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), rope64(x, cos, sin), rtol=1e-5, atol=1e-5)


def test_rope_refuses_more_pairs_than_the_head_has() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        apply_rope(torch.randn(1, 1, 4), torch.ones(1, 3), torch.ones(1, 3))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    bits=st.sampled_from(BITS),
    t=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    d=st.sampled_from([2, 8, 12]),
    page_size=st.sampled_from([1, 4, 16]),
    centered=st.booleans(),
    rotated=st.booleans(),
    data=st.data(),
)
def test_pages_hold_what_was_appended(
    bits: tuple[int, int],
    t: int,
    heads: tuple[int, int],
    d: int,
    page_size: int,
    centered: bool,
    rotated: bool,
    data: st.DataObject,
) -> None:
    hq, hkv = heads
    rotated = rotated and d != 2
    num_pages = -(-12 // page_size)
    pages = KVPages.empty(KVFormat(*bits), num_pages, hkv, page_size, d)
    before = [t.clone() for t in vars(pages).values() if isinstance(t, Tensor)]
    slots = data.draw(
        st.lists(st.integers(0, num_pages * page_size - 1), min_size=t, max_size=t, unique=True)
    )
    padding = data.draw(st.lists(st.booleans(), min_size=t, max_size=t))
    slots = [-1 if pad else s for s, pad in zip(slots, padding, strict=True)]
    q, k, v = torch.randn(t, hq, d), torch.randn(t, hkv, d) * 3 + 5, torch.randn(t, hkv, d)
    cos, sin = angles(t, d // 2)
    center = torch.randn(hkv, d) * 4 if centered else None
    rotation = hadamard_matrix(d).float() if rotated else None

    got = kv_append(
        q, k, v, cos, sin, torch.tensor(slots, dtype=torch.int64), pages, center, rotation
    )

    want_q, want_k, want_v = rope64(q, cos, sin), rope64(k, cos, sin), v.double()
    if center is not None:
        want_k = want_k - center.double()
    if rotation is not None:
        want_q, want_k = want_q @ rotation.double(), want_k @ rotation.double()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want_q, rtol=1e-4, atol=1e-4)
    for i, slot in enumerate(slots):
        if slot < 0:
            continue
        for side, want, n in (("k", want_k, bits[0]), ("v", want_v, bits[1])):
            error = (read(pages, side, slot).double() - want[i]).abs()
            assert (error <= tolerance(want[i], n)).all()
    # Everything else is as it was.
    untouched = torch.ones(num_pages * page_size, dtype=torch.bool)
    untouched[[s for s in slots if s >= 0]] = False
    after = [t for t in vars(pages).values() if isinstance(t, Tensor)]
    for old, new in zip(before, after, strict=True):
        if old.numel():
            old, new = old.transpose(1, 2).flatten(0, 1), new.transpose(1, 2).flatten(0, 1)
            assert torch.equal(old[untouched], new[untouched])


def test_rotation_and_center_do_not_change_softmax() -> None:
    # In float pages, so that only the algebra is seen: scores shift by a constant per query.
    t, d = 7, 8
    q, k, v = torch.randn(t, 4, d), torch.randn(t, 2, d), torch.randn(t, 2, d)
    cos, sin = angles(t, 4)
    slots = torch.arange(t)

    def weights(center: Tensor | None, rotation: Tensor | None) -> Tensor:
        pages = KVPages.empty(KVFormat(16, 16), 1, 2, t, d)
        queries = kv_append(q, k, v, cos, sin, slots, pages, center, rotation)
        keys = pages.k_codes[0].repeat_interleave(2, 0)
        return torch.einsum("thd,hsd->hts", queries, keys).softmax(-1)

    plain = weights(None, None)
    changed = weights(torch.randn(2, d) * 3, hadamard_matrix(d).float())
    torch.testing.assert_close(changed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (8, 4)])
@pytest.mark.parametrize(("hkv", "d"), [(2, 64), (1, 128)])
def test_a_token_does_not_know_its_chunk(bits: tuple[int, int], hkv: int, d: int) -> None:
    t = 50
    q, k, v = torch.randn(t, 3 * hkv, d), torch.randn(t, hkv, d), torch.randn(t, hkv, d)
    cos, sin = angles(t, d // 2)
    center, rotation = torch.randn(hkv, d), hadamard_matrix(d).float()
    slots = torch.arange(t)
    whole = KVPages.empty(KVFormat(*bits), 4, hkv, 16, d)
    parts = KVPages.empty(KVFormat(*bits), 4, hkv, 16, d)
    want = kv_append(q, k, v, cos, sin, slots, whole, center, rotation)
    for start, stop in itertools.pairwise((0, 1, 2, 19, 49, 50)):
        c = slice(start, stop)
        got = kv_append(q[c], k[c], v[c], cos[c], sin[c], slots[c], parts, center, rotation)
        assert torch.equal(got, want[c])
    for name, tensor in vars(whole).items():
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, getattr(parts, name)), name


def test_inputs_are_left_alone_and_float_pages_keep_their_dtype() -> None:
    tensors = [torch.randn(3, 2, 4) for _ in range(3)]
    before = [x.clone() for x in tensors]
    pages = KVPages.empty(KVFormat(16, 16), 1, 2, 4, 4, dtype=torch.bfloat16)
    kv_append(*tensors, *angles(3, 2), torch.arange(3), pages, torch.ones(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert pages.k_codes.dtype == torch.bfloat16
    assert torch.equal(pages.v_codes[0, :, :3].transpose(0, 1), tensors[2].bfloat16())
