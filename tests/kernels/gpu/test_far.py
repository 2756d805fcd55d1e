"""Tensors of more than 2^31 elements, on a GPU: their last rows are as good as their first.

Small ones go the same way without a GPU.
"""

import pytest
import torch

from helpers.activations import equal
from helpers.sampling_params import random_params
from kernels.test_linear import random_rows, random_weight
from qoq.formats.activation import QuantizedActivation
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat
from qoq.kernels.gpu.act_quant import MAX_COLUMNS, act_quant
from qoq.kernels.gpu.attention import attention
from qoq.kernels.gpu.kv_append import kv_append
from qoq.kernels.gpu.linear import prepare
from qoq.kernels.gpu.sample import sample
from qoq.kernels.sample import SamplingBatch

FAR = (1 << 31) + (1 << 18)
LAST = 3

pytestmark = pytest.mark.usefixtures("faithful")


def elements(device: torch.device, least_bytes: int, few: int) -> int:
    """FAR on a GPU with room for it; ``few`` without one."""
    if device.type != "cuda":
        return few
    if torch.cuda.mem_get_info(device)[0] < least_bytes:
        pytest.skip("needs a larger GPU")
    return FAR


def test_the_last_rows_of_many(device: torch.device) -> None:
    size = elements(device, 20 << 30, 1 << 10)
    n = MAX_COLUMNS if size == FAR else 64
    m = size // n + 1
    weight = prepare(random_weight("int8", n, 32).to(device))
    some = random_rows(m, 32)
    x = QuantizedActivation(*(t.to(device) for t in (some.codes, some.scale, some.row_sum)))
    few = QuantizedActivation(x.codes[-LAST:], x.scale[-LAST:].clone(), x.row_sum[-LAST:].clone())
    out, want = weight.multiply(x, None), weight.multiply(few, None)
    assert torch.equal(out[-LAST:], want)
    every, own = act_quant(out, 8), act_quant(want, 8)
    assert isinstance(every, QuantizedActivation)
    last = QuantizedActivation(every.codes[-LAST:], every.scale[-LAST:], every.row_sum[-LAST:])
    equal(last, own)
    columns = vars(random_params(m, device=device))
    drawn = sample(out, SamplingBatch(**columns))
    part = sample(want, SamplingBatch(**{name: t[-LAST:] for name, t in columns.items()}))
    assert torch.equal(drawn.ids[-LAST:], part.ids)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_last_pages_of_many(device: torch.device, bits: int) -> None:
    size = 2 * elements(device, 12 << 30, 1 << 15)  # bytes; attention reads two at a time
    count, heads, dim, page_size = size // (2 * 64 * 128 * bits // 8), 2, 128, 64
    kv = KVFormat(bits, bits)
    many, few = (
        KVPages.empty(kv, pages, heads, page_size, dim, device=device) for pages in (count, LAST)
    )
    tokens, first = LAST * page_size - 7, (count - LAST) * page_size
    q, k, v = (torch.randn(tokens, h, dim, device=device) for h in (4, heads, heads))
    cos, sin = torch.rand(2, tokens, dim // 2, device=device)
    slots = torch.arange(tokens, device=device)
    asked = kv_append(q, k, v, cos, sin, slots + first, many)
    assert torch.equal(asked, kv_append(q, k, v, cos, sin, slots, few))
    lens = torch.tensor([tokens], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 2], dtype=torch.int32, device=device)
    table = torch.arange(LAST, dtype=torch.int32, device=device)[None]
    far, near = (
        attention(asked[-2:], pages, at, lens, starts, 0.1)
        for pages, at in ((many, table + (count - LAST)), (few, table))
    )
    assert torch.equal(far, near)
    assert far.isfinite().all()
