"""Our full-precision logits equal transformers', family by family; the cache changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.families import VARIANTS, make_family_model, write_family_model
from helpers.packed import random_packed_tensors
from qoq.formats.activation import QuantizedActivation
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat, QuantScheme
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight
from qoq.kernels.kv_append import apply_rope
from qoq.models.batch import Batch
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder, build_decoder
from qoq.models.load import load_model
from qoq.models.rope import cos_sin

PAGE = 8


def pages_for(decoder: Decoder, num_pages: int, kv: str = "w16a16") -> list[KVPages]:
    config, fmt = decoder.config, QuantScheme.parse(kv).kv
    return [
        KVPages.empty(fmt, num_pages, config.num_kv_heads, PAGE, config.head_dim)
        for _ in decoder.layers
    ]


def random_ids(length: int, vocab: int) -> list[int]:
    return torch.randint(0, vocab, (length,)).tolist()


def prefill(decoder: Decoder, ids: list[int], kv: str = "w16a16") -> Tensor:
    batch = Batch.prefill([ids], PAGE)
    return decoder(batch, pages_for(decoder, batch.num_pages, kv))


def decoder_of(model: Any) -> Decoder:
    """Our decoder over a transformers model's own tensors."""
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    return build_decoder(ModelConfig.from_hf(raw), QuantScheme.parse("w16a16"), tensors.__getitem__)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    model = write_family_model(tmp_path, name)
    loaded = load_model(tmp_path)
    ids = [random_ids(37, 211), random_ids(11, 211)]
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([row])).logits[0] for row in ids])
    batch = Batch.prefill(ids, PAGE)
    logits = loaded.decoder(batch, pages_for(loaded.decoder, batch.num_pages))
    assert wanted.std() > 0.1  # a model that says nothing would pass
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_and_decode_equal_full_prefill(name: str) -> None:
    decoder = decoder_of(make_family_model(name))
    ids, other = random_ids(30, 211), random_ids(9, 211)
    full, full_other = prefill(decoder, ids), prefill(decoder, other)
    kv = pages_for(decoder, 10)
    own, pages = [6, 1, 9, 3], [[6, 1, 9, 3], [0, 7]]
    # A chunk alone; a chunk beside another prompt; then both decode, token by token.
    steps = [
        Batch.build([ids[:13]], [0], [own], PAGE),
        Batch.build([ids[13:26], other[:5]], [13, 0], pages, PAGE),
        *(
            Batch.build([[ids[26 + i]], [other[5 + i]]], [26 + i, 5 + i], pages, PAGE)
            for i in range(4)
        ),
    ]
    got = [decoder(step, kv) for step in steps]
    mine = [got[0], got[1][:13], *(g[:1] for g in got[2:])]
    others = [got[1][13:], *(g[1:] for g in got[2:])]
    torch.testing.assert_close(torch.cat(mine), full, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(others), full_other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-dynamic-d80", "qwen2.5-yarn", "llama3.1-d128"])
def test_decode_beyond_the_trained_context_equals_transformers(name: str) -> None:
    model = make_family_model(name, max_position_embeddings=24)
    decoder = decoder_of(model)
    ids = random_ids(33, 211)
    with torch.no_grad():
        out = model(torch.tensor([ids[:24]]), use_cache=True)
        wanted, past = [out.logits[0]], out.past_key_values
        for token in ids[24:]:
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            wanted.append(out.logits[0])
    torch.testing.assert_close(prefill(decoder, ids), torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_rows_select_logits() -> None:
    decoder = decoder_of(make_family_model("qwen3-d256"))
    batch = Batch.prefill([random_ids(5, 211), random_ids(3, 211)], PAGE)
    every = decoder(batch, pages_for(decoder, 2))
    last = decoder(batch, pages_for(decoder, 2), torch.tensor([4, 7]))
    torch.testing.assert_close(last, every[[4, 7]], rtol=1e-5, atol=1e-5)


def test_padding_rows_change_nothing() -> None:
    # Quantized: float products may be summed in another order for another number of rows.
    model = make_family_model("llama-mha")
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config, scheme = ModelConfig.from_hf(raw), QuantScheme.parse("w4a8kv4-g32")
    decoder = build_decoder(config, scheme, random_packed_tensors(config, scheme).__getitem__)
    ids = random_ids(6, 211)
    batch = Batch.prefill([ids], PAGE)
    kv = pages_for(decoder, 1, "w4a8kv4")
    wanted = decoder(batch, kv)
    padded = Batch(
        torch.cat([batch.input_ids, torch.zeros(3, dtype=torch.int64)]),
        torch.cat([batch.positions, torch.zeros(3, dtype=torch.int64)]),
        torch.cat([batch.slots, torch.full((3,), -1)]),
        batch.page_table,
        batch.kv_lens,
        batch.cu_seqlens_q,
    )
    kv_padded = pages_for(decoder, 1, "w4a8kv4")
    got = decoder(padded, kv_padded)[:6]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(kv_padded[0].k_codes, kv[0].k_codes)


def test_tied_head_shares_the_embedding() -> None:
    decoder = decoder_of(make_family_model("llama3.2-tied-d64"))
    assert isinstance(decoder.lm_head.weight, Tensor)
    assert decoder.lm_head.weight.data_ptr() == decoder.embed.data_ptr()


def test_steps_of_a_layer_are_those_of_transformers() -> None:
    model = make_family_model("qwen3-windows-biased")
    decoder = decoder_of(model)
    ids = random_ids(10, 211)
    layer = model.model.layers[1]
    watched = {
        "qkv": layer.self_attn.q_proj,
        "o": layer.self_attn.o_proj,
        "gate_up": layer.mlp.up_proj,
        "down": layer.mlp.down_proj,
    }
    wanted: dict[str, Tensor] = {}
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda _, x, name=name: wanted.update({name: x[0][0]}))
    with torch.no_grad():
        past = model(torch.tensor([ids]), use_cache=True).past_key_values
    batch = Batch.prefill([ids], PAGE)
    cos, sin = cos_sin(decoder.config.rope, batch.positions)
    first, second = decoder.layers[:2]
    kv = pages_for(decoder, 2)
    x, residual = first(decoder.embed[batch.input_ids], None, cos, sin, batch, kv[0])
    seen: list[Tensor] = []
    got: dict[str, Any] = {}
    got["qkv"], after = second.attention_input(x, residual)
    got["o"] = second.attend(
        got["qkv"], cos, sin, batch, kv[1], observe=lambda *qkv: seen.extend(qkv)
    )
    got["gate_up"], after = second.mlp_input(second.o(got["o"]), after)
    got["down"] = second.mlp_hidden(got["gate_up"])
    for name in watched:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4)
    # The steps are the layer.
    out, stream = second(x, residual, cos, sin, batch, pages_for(decoder, 2)[1])
    assert torch.equal(out, second.down(got["down"]))
    assert torch.equal(stream, after)
    # What is observed becomes transformers' cache by RoPE alone; a sliding layer keeps its window.
    assert [tuple(t.shape) for t in seen] == [(10, 6, 32), (10, 2, 32), (10, 2, 32)]
    keys, values = (
        cache[0].transpose(0, 1) for cache in (past.layers[1].keys, past.layers[1].values)
    )
    kept = keys.shape[0]
    roped = apply_rope(seen[1], cos, sin)[-kept:]
    torch.testing.assert_close(roped, keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[2][-kept:], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme_name", ["w4a8kv4-g32", "w4a8kv4", "w8a8kv8", "w4a16k8v4-g32"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3-windows-biased"])
def test_packed_decoder_equals_its_dequantized_self(name: str, scheme_name: str) -> None:
    model = make_family_model(name)
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config, scheme = ModelConfig.from_hf(raw), QuantScheme.parse(scheme_name)
    tensors = random_packed_tensors(config, scheme)
    asked: set[str] = set()

    def get(tensor: str) -> Tensor:
        asked.add(tensor)
        return tensors[tensor]

    packed = build_decoder(config, scheme, get, names=tensors)
    assert asked == set(tensors)  # every tensor of the checkpoint is read
    assert packed.layers[0].k_center is not None
    # The same decoder with float weights: W16A8 in the same arithmetic, up to rounding.
    floats = dict(tensors)
    for tensor in tensors:
        if tensor.endswith(".codes"):
            stem = tensor.removesuffix(".codes")
            floats[f"{stem}.weight"] = _dequantized(tensors, stem)
    act = "a8" if scheme.act_bits == 8 else "a16"
    float_scheme = QuantScheme.parse(f"w16{act}{scheme.kv}", lm_head_bits=16)
    plain = build_decoder(config, float_scheme, floats.__getitem__, names=tensors)
    batch = Batch.prefill([random_ids(19, 211)], PAGE)
    kv_name = f"w16a16{scheme.kv}"
    hidden = packed.hidden(batch, pages_for(packed, batch.num_pages, kv_name))
    wanted = plain.hidden(batch, pages_for(plain, batch.num_pages, kv_name))
    # Rounding differences may move single codes, so compare on the whole.
    assert (hidden - wanted).norm() < 0.03 * wanted.norm()
    logits, wanted_logits = packed.logits(wanted), plain.logits(wanted)
    assert (logits - wanted_logits).norm() < 0.03 * wanted_logits.norm()


def _dequantized(tensors: dict[str, Tensor], stem: str) -> Tensor:
    codes = tensors[f"{stem}.codes"]
    if f"{stem}.channel_scale" in tensors:
        names = ("channel_scale", "group_scale", "group_offset")
        return GroupWeight(codes, *(tensors[f"{stem}.{n}"] for n in names)).dequantize()
    if f"{stem}.offset" in tensors:
        offset = tensors[f"{stem}.offset"]
        return ChannelWeight(codes, tensors[f"{stem}.scale"], offset).dequantize()
    return Int8Weight(codes, tensors[f"{stem}.scale"]).dequantize()


def test_int8_activations_enter_every_linear() -> None:
    model = make_family_model("llama-mha")
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config, scheme = ModelConfig.from_hf(raw), QuantScheme.parse("w4a8kv4-g32")
    tensors = random_packed_tensors(config, scheme)
    decoder = build_decoder(config, scheme, tensors.__getitem__)
    assert decoder.layers[0].k_center is None  # its name was not announced
    assert decoder.lm_head.act_bits == 8
    batch = Batch.prefill([random_ids(3, 211)], PAGE)
    cos, sin = cos_sin(config.rope, batch.positions)
    layer, pages = decoder.layers[0], pages_for(decoder, 1, "w4a8kv4")[0]
    into_qkv, residual = layer.attention_input(decoder.embed[batch.input_ids], None)
    into_o = layer.attend(into_qkv, cos, sin, batch, pages)
    into_gate_up, residual = layer.mlp_input(layer.o(into_o), residual)
    into_down = layer.mlp_hidden(into_gate_up)
    for entering in (into_qkv, into_o, into_gate_up, into_down):
        assert isinstance(entering, QuantizedActivation)
    assert residual.dtype == torch.float32


@pytest.mark.parametrize("kv", ["w16a16", "w16a16kv8"])
def test_center_and_rotation_leave_logits_alone(kv: str) -> None:
    model = make_family_model("llama3.1-d128")
    plain = decoder_of(model)
    tensors = {name: t.detach() for name, t in model.state_dict().items()}
    for i in range(3):
        tensors[f"model.layers.{i}.self_attn.k_center"] = torch.randn(2, 128)
    scheme = QuantScheme.parse("w16a16")
    turned = build_decoder(plain.config, scheme, tensors.__getitem__, True, names=tensors)
    assert turned.layers[2].k_rotation is turned.layers[0].k_rotation is not None
    ids = random_ids(20, 211)
    got, wanted = prefill(turned, ids, kv), prefill(plain, ids)
    tolerance = 1e-4 if kv == "w16a16" else 0.1
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def test_lower_kv_precision_costs_more() -> None:
    decoder = decoder_of(make_family_model("llama-gqa-linear"))
    ids = random_ids(40, 211)
    exact = prefill(decoder, ids)
    errors = [(prefill(decoder, ids, f"w16a16kv{bits}") - exact).norm() for bits in (4, 8)]
    assert 0 < errors[1] < errors[0] / 4


def test_mixed_kv_override(tmp_path: Path) -> None:
    write_family_model(tmp_path, "qwen2")
    loaded = load_model(tmp_path, kv=KVFormat(8, 4))
    assert str(loaded.scheme) == "w16a16k8v4"
    assert loaded.path == tmp_path
