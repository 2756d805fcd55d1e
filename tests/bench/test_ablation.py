"""Linears that dequantize: the same answers as ours but for bf16, and every linear is one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.bench import ablation
from qoq.bench.ablation import DequantizedWeight, dequantize_linears
from qoq.bench.random_weights import random_decoder, random_linears
from qoq.bench.throughput import run
from qoq.formats.activation import quantize_per_token
from qoq.formats.scheme import QuantScheme, WeightFormat
from qoq.kernels.linear import linear
from qoq.kernels.prepared import PreparedWeight
from qoq.models.config import ModelConfig


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 70),
    k=st.sampled_from([128, 256, 1024]),
    fmt=st.sampled_from(
        [WeightFormat(4, 128), WeightFormat(4, 32), WeightFormat(4), WeightFormat(8)]
    ),
    part=st.sampled_from([1, 700, 1 << 20]),
    biased=st.booleans(),
    quantized=st.booleans(),
)
def test_products_are_those_of_the_packed_weight(
    m: int, n: int, k: int, fmt: WeightFormat, part: int, biased: bool, quantized: bool
) -> None:
    weight = random_linears(n, k, fmt, 1, backend="oracle")[0][0]
    assert not isinstance(weight, PreparedWeight)
    rows = torch.randn(m, k)
    x = quantize_per_token(rows) if quantized else rows
    bias = torch.randn(n) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "PART_ELEMENTS", part)
        got = linear(x, DequantizedWeight(weight), bias)
    want = linear(x, weight, bias, backend="oracle")
    assert got.dtype == torch.float32
    # bf16 rounds rows, and the product, to 2^-9 of their size each.
    size = rows.abs() @ weight.dequantize().abs().T + want.abs()
    assert bool(((got - want).abs() <= 2**-7 * size + 1e-6).all())


def test_every_linear_is_replaced(small: ModelConfig) -> None:
    scheme = QuantScheme.parse("w4a8-g128")
    decoder = dequantize_linears(random_decoder(small, scheme, backend="oracle"))
    linears = [decoder.lm_head]
    for layer in decoder.layers:
        linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
    for each in linears:
        assert isinstance(each.weight, DequantizedWeight)
        assert each.act_bits == 16
    result = run(decoder, scheme.kv, batch=2, prompt_len=5, output_len=3)
    assert result.decode_tok_s > 0


def test_prepared_weights_are_refused(small: ModelConfig) -> None:
    decoder = random_decoder(small, QuantScheme.parse("w4a8kv4"))
    if not isinstance(decoder.lm_head.weight, PreparedWeight):
        pytest.skip("no kernels here")
    with pytest.raises(ValueError, match="laid out"):
        dequantize_linears(decoder)
