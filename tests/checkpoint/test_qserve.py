"""QServe in and out: byte order by hand, both zero styles, both scale orders, round trips."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.checkpoints import CONFIG, HIDDEN, SHAPES, VOCAB, tiny_tensors, write_checkpoint
from qoq.checkpoint.packed import PackedCheckpoint
from qoq.checkpoint.qserve import export_qserve, import_qserve
from qoq.checkpoint.qserve_groups import order_evidence, to_group_weight
from qoq.checkpoint.qserve_layout import (
    ORDERS,
    ScaleOrder,
    pack_group_params,
    pack_tiles,
    unpack_group_params,
    unpack_tiles,
)
from qoq.errors import (
    CheckpointError,
    CheckpointTensorError,
    CheckpointValueError,
    CheckpointVersionError,
    QoqError,
    ResourceError,
    SourceError,
    UnsupportedModelError,
)
from qoq.formats.packing import unpack_nibbles
from qoq.formats.progressive import group_values
from qoq.formats.scheme import KVFormat, QuantScheme
from qoq.formats.weights import GroupWeight, packed_type

GROUPS = QuantScheme.parse("w4a8kv4-g128", 16)
CHANNELS = QuantScheme.parse("w4a8kv4", 16)
INT8 = QuantScheme.parse("w8a8kv8", 16)
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]

# --- the layout, element by element ---


def tile_place(n: int, k: int, columns: int) -> tuple[int, int]:
    """Flat byte of qweight and nibble (0 low) that hold the code of row n, column k."""
    tile = (n // 32) * (columns // 32) + k // 32
    p, n2, nl = n % 32 // 16, n % 16 // 8, n % 8
    kp, kl, kr = k % 32 // 16, k % 16 // 4, k % 4
    return tile * 512 + (nl * 4 + kl) * 16 + (2 * kp + n2) * 4 + kr, p


def stored_channel(order: ScaleOrder, place: int) -> int:
    """The channel (of 32) whose group parameters are stored at ``place``."""
    kernel = [0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27]
    kernel += [4, 12, 20, 28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31]
    pairs = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    pairs += [16, 24, 17, 25, 18, 26, 19, 27, 20, 28, 21, 29, 22, 30, 23, 31]
    return (kernel if order == "kernel" else pairs)[place]


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 32), (32, 96), (96, 128)])
def test_tile_order(rows: int, columns: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    qweight = pack_tiles(codes)
    assert qweight.shape == (rows, columns // 2)
    assert qweight.dtype == torch.int8
    flat = qweight.view(torch.uint8).flatten().tolist()
    for n in range(rows):
        for k in range(columns):
            byte, nibble = tile_place(n, k, columns)
            assert flat[byte] >> (4 * nibble) & 15 == codes[n, k]
    assert torch.equal(unpack_tiles(qweight), codes)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("rows", "groups"), [(32, 1), (96, 3)])
def test_order_of_group_params(order: ScaleOrder, rows: int, groups: int) -> None:
    params = torch.randint(-128, 128, (rows, groups)).to(torch.int8)
    stored = pack_group_params(params, order)
    assert stored.shape == (groups, rows)
    for group in range(groups):
        for place in range(rows):
            channel = place // 32 * 32 + stored_channel(order, place % 32)
            assert stored[group, place] == params[channel, group]
    assert torch.equal(unpack_group_params(stored, order), params)


def test_golden_tile() -> None:
    """One tile whose code is k mod 16 in rows 0..15 and 15 in rows 16..31."""
    codes = (torch.arange(32) % 16).repeat(32, 1)
    codes[16:] = 15
    row = bytes.fromhex("f0f1f2f3" * 4 + "f4f5f6f7" * 4 + "f8f9fafb" * 4 + "fcfdfeff" * 4)
    assert pack_tiles(codes.to(torch.uint8)).view(torch.uint8).numpy().tobytes() == row * 8


# --- making QServe files without our packer ---


def fake_quantize(
    weight: Tensor, groups: bool, zero_style: str
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """RTN as QServe's quantizers do it: codes [N, K], their scale.pt entries, level-1 values.

    zero_style: "zero" (codes, 0..15), "signed zero" (codes, -8..7) or "scaled_zero".
    """
    rows = weight.shape[0]
    if not groups:
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        scale = ((high - low) / 15).half().float()[:, None]
        w8, low = weight, low[:, None]
    else:
        level1 = (weight.abs().amax(1) / 119).half().float()
        w8 = (weight / level1[:, None]).unflatten(1, (-1, 128))
        low, high = w8.amin(-1), w8.amax(-1)
        if zero_style != "scaled_zero":
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / 15).round().clamp(1, 127)
        w8, scale, low = w8, scale.unsqueeze(-1), low.unsqueeze(-1)
    if zero_style == "scaled_zero":
        shift = (-low).round() if groups else (-low).half().float()
        codes = ((w8 + shift) / scale).round().clamp(0, 15)
        values, zero = codes * scale - shift, shift
    else:
        zero = (-low / scale).round().clamp(0, 15)
        codes = (w8 / scale + zero).round().clamp(0, 15)
        values = (codes - zero) * scale
        zero = zero - 8 if zero_style == "signed zero" else zero
    name = zero_style.split()[-1]
    entries = {name: zero.reshape(rows, 1, -1, 1).half()}
    if groups:
        entries["scale.0"] = level1.half().reshape(rows, 1, 1, 1)
        entries["scale.1"] = scale.to(torch.int8).reshape(rows, 1, -1, 1)
        values = values * level1[:, None, None]
    else:
        entries["scale.0"] = scale.half().reshape(rows, 1, 1, 1)
    return codes.reshape(weight.shape).to(torch.uint8), entries, values.reshape(weight.shape)


def plain_tensors() -> Tensors:
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN).half(),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN).half(),
        "model.norm.weight": torch.ones(HIDDEN).half(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(32),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"] = torch.ones(HIDDEN).half()
    return tensors


def fake_quant_pair(folder: Path, groups: bool, zero_style: str) -> Tensors:
    """model.pt and scale.pt of one layer; returns the weights they stand for."""
    model, scales, truth = plain_tensors(), {}, {}
    for name, shape in SHAPES.items():
        linear = f"model.layers.0.{name}"
        _, entries, values = fake_quantize(torch.randn(shape) * 0.05, groups, zero_style)
        model[f"{linear}.weight"], truth[linear] = values.half(), values
        scales |= {f"{linear}.weight.{key}": value for key, value in entries.items()}
    folder.mkdir()
    torch.save(model, folder / "model.pt")
    torch.save(scales, folder / "scale.pt")
    return truth


def converted(folder: Path, groups: bool, zero_style: str, order: ScaleOrder = "kernel") -> Tensors:
    """pytorch_model.bin of one layer in QServe's layout, placed element by element."""
    tensors, truth = plain_tensors(), {}
    for name, (rows, columns) in SHAPES.items():
        linear = f"model.layers.0.{name}"
        codes, entries, values = fake_quantize(
            torch.randn(rows, columns) * 0.05, groups, zero_style
        )
        n = torch.arange(rows)[:, None].expand(rows, columns)
        k = torch.arange(columns).expand(rows, columns)
        tile = n // 32 * (columns // 32) + k // 32
        byte = tile * 512 + (n % 8 * 4 + k % 16 // 4) * 16
        byte = byte + (2 * (k % 32 // 16) + n % 16 // 8) * 4 + k % 4
        flat = torch.zeros(rows * columns // 2, dtype=torch.int64)
        flat.index_add_(0, byte.flatten(), (codes.long() << (n % 32 // 16 * 4)).flatten())
        tensors[f"{linear}.qweight"] = (
            flat.to(torch.uint8).view(torch.int8).reshape(rows, columns // 2)
        )
        tensors[f"{linear}.s1_scales"] = entries["scale.0"].flatten()
        zero = entries[zero_style].float().reshape(rows, -1)
        if groups:
            scale = entries["scale.1"].reshape(rows, -1)
            if zero_style == "zero":
                zero = zero * scale
            wrapped = (-zero.int()).to(torch.int8)
            channels = [p // 32 * 32 + stored_channel(order, p % 32) for p in range(rows)]
            tensors[f"{linear}.s2_scales"] = scale.T[:, channels].contiguous()
            tensors[f"{linear}.s2_zeros"] = wrapped.T[:, channels].contiguous()
        else:
            if zero_style == "zero":
                zero = zero * entries["scale.0"].float().reshape(rows, 1)
            tensors[f"{linear}.s1_szeros"] = zero.flatten().half()
            step = entries["scale.0"].float().reshape(rows, 1)
            values = codes * step - tensors[f"{linear}.s1_szeros"].float()[:, None]
        truth[linear] = values
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    write_config(folder)
    return truth


def write_config(folder: Path, **changes: Any) -> None:
    config = {**CONFIG, "num_hidden_layers": 1, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def weights_of(checkpoint: PackedCheckpoint, linear: str) -> Tensor:
    kind = packed_type(checkpoint.scheme.weight)
    parts = {f.name: checkpoint.get(f"{linear}.{f.name}") for f in fields(kind)}
    return kind(**parts).dequantize()


# --- import ---


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("zero_style", ["zero", "scaled_zero"])
def test_import_converted(tmp_path: Path, groups: bool, zero_style: str) -> None:
    truth = converted(tmp_path / "q", groups, zero_style)
    (tmp_path / "q" / "tokenizer.json").write_text("{}")
    result = import_qserve(tmp_path / "q", tmp_path / "out")
    checkpoint = PackedCheckpoint.open(result.path)
    assert checkpoint.scheme == result.scheme == (GROUPS if groups else CHANNELS)
    assert result.scale_order == ("kernel" if groups else None)
    assert result.notes == ()
    for linear, values in truth.items():
        assert torch.equal(weights_of(checkpoint, linear), values.float())
    names = {n for n in checkpoint.names() if not n.startswith(tuple(truth))}
    assert names == set(plain_tensors()) - {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert checkpoint.dtype("model.norm.weight") == torch.float32
    assert checkpoint.dtype("lm_head.weight") == torch.float16
    assert checkpoint.manifest["recipe"]["imported_from"] == "qserve"
    assert (result.path / "tokenizer.json").exists()


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("zero_style", ["zero", "signed zero", "scaled_zero"])
def test_import_model_pt_and_scale_pt(tmp_path: Path, groups: bool, zero_style: str) -> None:
    truth = fake_quant_pair(tmp_path / "q", groups, zero_style)
    (tmp_path / "original").mkdir()
    write_config(tmp_path / "original")
    with pytest.raises(SourceError, match=r"no config\.json"):
        import_qserve(tmp_path / "q", tmp_path / "out")
    result = import_qserve(
        tmp_path / "q", tmp_path / "out", config_folder=tmp_path / "original", kv=KVFormat(8, 8)
    )
    checkpoint = PackedCheckpoint.open(result.path)
    assert checkpoint.scheme.kv == KVFormat(8, 8)
    for linear, values in truth.items():
        assert torch.equal(weights_of(checkpoint, linear), values)


@pytest.mark.parametrize("zero_style", ["zero", "scaled_zero"])
def test_the_wrong_scale_order_is_found_and_put_right(tmp_path: Path, zero_style: str) -> None:
    truth = converted(tmp_path / "q", True, zero_style, "pairs")
    result = import_qserve(tmp_path / "q", tmp_path / "out")
    assert result.scale_order == "pairs"
    assert "misread" in result.notes[0]
    checkpoint = PackedCheckpoint.open(result.path)
    for linear, values in truth.items():
        assert torch.equal(weights_of(checkpoint, linear), values)
    again = import_qserve(tmp_path / "q", tmp_path / "again", scale_order="pairs")
    assert (again.path / "layer-00000.safetensors").read_bytes() == (
        result.path / "layer-00000.safetensors"
    ).read_bytes()


def test_the_wrong_scale_order_overflows_when_forced(tmp_path: Path) -> None:
    converted(tmp_path / "q", True, "zero", "pairs")
    with pytest.raises(CheckpointValueError, match="leave int8"):
        import_qserve(tmp_path / "q", tmp_path / "out", scale_order="kernel")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tail", ["normal", "heavy", "uniform"])
@pytest.mark.parametrize("zero_style", ["zero", "scaled_zero"])
@pytest.mark.parametrize("order", ORDERS)
def test_order_evidence(tail: str, zero_style: str, order: ScaleOrder) -> None:
    shape = (64, 512)
    weight = {
        "normal": torch.randn(shape),
        "heavy": torch.distributions.StudentT(4.0).sample(shape),
        "uniform": torch.rand(shape) - 0.5,
    }[tail]
    codes, entries, _ = fake_quantize(weight, True, zero_style)
    scale = entries["scale.1"].reshape(64, -1)
    zero = entries[zero_style].reshape(64, -1) * (scale if zero_style == "zero" else 1)
    stored = [pack_group_params(p.to(torch.int8), order) for p in (scale, -zero.int())]
    read = {o: tuple(unpack_group_params(s, o) for s in stored) for o in ORDERS}
    found = order_evidence(codes, {o: (s, z) for o, (s, z) in read.items()}).order()
    # Uniform weights with min-max zeros look the same to every row: not told, never wrong.
    assert found == order or (tail == "uniform" and found is None)


def test_undecided_orders_are_refused_unless_said(tmp_path: Path) -> None:
    converted(tmp_path / "q", True, "zero")
    path = tmp_path / "q" / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            tensors[name] = torch.randint(-128, 128, tensor.shape).to(torch.int8)
        elif name.endswith(".s2_scales"):
            tensors[name] = torch.randint(1, 6, tensor.shape).to(torch.int8)
        elif name.endswith(".s2_zeros"):
            tensors[name] = torch.randint(-60, 0, tensor.shape).to(torch.int8)
    torch.save(tensors, path)
    with pytest.raises(CheckpointValueError, match="don't tell"):
        import_qserve(tmp_path / "q", tmp_path / "out")
    with pytest.raises(SourceError, match="does not exist"):
        import_qserve(tmp_path / "q", tmp_path / "out", scale_order="random")  # type: ignore[arg-type]
    kernel = import_qserve(tmp_path / "q", tmp_path / "out", scale_order="kernel")
    pairs = import_qserve(tmp_path / "q", tmp_path / "out2", scale_order="pairs")
    assert not torch.equal(
        weights_of(PackedCheckpoint.open(kernel.path), UP),
        weights_of(PackedCheckpoint.open(pairs.path), UP),
    )


def test_equal_params_need_no_order(tmp_path: Path) -> None:
    codes = torch.randint(0, 16, (32, 128), dtype=torch.uint8)
    same = torch.full((32, 1), 3, dtype=torch.int8)
    assert order_evidence(codes, dict.fromkeys(ORDERS, (same, -same))).order() == "kernel"


# --- groups in other numbers ---


@given(
    scale=st.integers(0, 127),
    zero=st.integers(-128, 127),
    used=st.lists(st.integers(0, 15), min_size=1, max_size=4),
)
def test_groups_keep_their_values_or_are_refused(scale: int, zero: int, used: list[int]) -> None:
    codes = torch.tensor([(used * 32)[:32]], dtype=torch.uint8)
    params = [torch.tensor([[p]], dtype=torch.int8) for p in (scale, zero)]
    kernel = (codes.int() * scale + zero + 128) % 256 - 128  # bytes that wrap, as QServe's do
    rise = (codes.int() - codes.int().amin()) * scale
    wraps = not torch.equal(kernel - kernel[codes == codes.amin()][0], rise)
    try:
        weight = to_group_weight("x", codes, torch.ones(1), *params)
    except CheckpointValueError:
        steps = set((kernel - kernel.amin()).unique().tolist())
        fits = [s for s in range(1, 17) if all(v % s == 0 and v <= 15 * s for v in steps)]
        assert wraps or not fits
        return
    assert torch.equal(weight.int8(), kernel.to(torch.int8))
    values = group_values(
        unpack_nibbles(weight.codes)[:, None], weight.group_scale, weight.group_offset
    )
    assert torch.equal(values[:, 0], kernel)  # without any wrapping
    assert 1 <= int(weight.group_scale) <= 16


def test_wrapped_zeros_and_big_scales() -> None:
    one = torch.ones(1)

    def weight(codes: list[int], scale: int, zero: int) -> GroupWeight:
        full = torch.tensor([(codes * 32)[:32]], dtype=torch.uint8)
        return to_group_weight("x", full, one, torch.tensor([[scale]]), torch.tensor([[zero]]))

    low = weight([8, 15], 16, (-15 * 16 + 256))  # zero 15: stored as 16, meant as -240
    assert low.int8()[0, :2].tolist() == [-112, 0]
    assert int(low.group_offset) == -112
    wide = weight([0, 3], 30, -45)  # one step of 90 is fifteen of 6
    assert wide.int8()[0, :2].tolist() == [-45, 45]
    assert int(wide.group_scale) == 6
    with pytest.raises(CheckpointValueError, match="fit no smaller"):
        weight([0, 1, 2, 3, 4, 5, 6, 7], 17, -60)
    with pytest.raises(CheckpointValueError, match="leave int8"):
        weight([0, 15], 18, -128)
    with pytest.raises(CheckpointValueError, match="negative scale"):
        weight([0, 1], -1, 0)


def test_rows_of_scale_zero_stay_zero(tmp_path: Path) -> None:
    for groups in (True, False):
        folder = tmp_path / f"q{groups}"
        truth = converted(folder, groups, "zero")
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        tensors[f"{UP}.s1_scales"][3] = 0
        if not groups:
            tensors[f"{UP}.s1_szeros"][3] = 0.5
        torch.save(tensors, folder / "pytorch_model.bin")
        result = import_qserve(folder, tmp_path / f"out{groups}")
        weight = weights_of(PackedCheckpoint.open(result.path), UP)
        assert (weight[3] == (0.0 if groups else -0.5)).all()
        assert torch.equal(weight[4:], truth[UP][4:].float())


# --- what an import refuses ---


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Replace (or drop) tensors; ``X`` in a keyword stands for the up projection."""
    path = folder / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    for key, tensor in tensors.items():
        name = key.replace("X_", f"{UP}.").replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    torch.save(state, path)


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ({"X_s2_zeros": None}, CheckpointTensorError, "s2_zeros is missing"),
        ({"X_s1_scales": None}, CheckpointTensorError, "s1_scales is missing"),
        ({"X_s1_scales": torch.ones(7).half()}, CheckpointTensorError, r"must be \[256\]"),
        ({"X_s1_scales": torch.full((256,), torch.nan)}, CheckpointValueError, "NaN"),
        ({"X_qweight": torch.zeros(256, 64)}, CheckpointTensorError, "QServe's has torch.int8"),
        ({"X_qweight": torch.zeros(250, 64).char()}, CheckpointTensorError, "tiles of 32"),
        ({"X_qweight": torch.zeros(256).char()}, CheckpointTensorError, "2 dimensions"),
        ({"X_s2_scales": torch.ones(3, 256).char()}, CheckpointTensorError, r"\[groups, 256\]"),
        (
            {"X_s2_scales": torch.ones(16, 256).char(), "X_s2_zeros": torch.ones(16, 256).char()},
            CheckpointTensorError,
            "groups must be of",
        ),
        ({"mystery": torch.ones(2)}, CheckpointTensorError, "mystery is unexpected"),
        ({"X_weight": torch.ones(2)}, CheckpointTensorError, "up_proj.weight is unexpected"),
        ({"model__embed_tokens__weight": None}, CheckpointTensorError, "embed_tokens.* missing"),
        ({"lm_head__weight": None}, CheckpointTensorError, "lm_head.weight is missing"),
        ({"lm_head__weight": torch.ones(2, 2).int()}, CheckpointTensorError, "must be a float"),
        ({"lm_head__weight": torch.tensor([[torch.inf]])}, CheckpointValueError, "infinity"),
        ({"model__layers__3__mlp__up_proj__bias": torch.ones(1)}, CheckpointTensorError, "lacks"),
    ],
)
def test_import_refuses(
    tmp_path: Path, tensors: dict[str, Any], error: type[QoqError], match: str
) -> None:
    converted(tmp_path / "q", True, "zero")
    change(tmp_path / "q", **tensors)
    with pytest.raises(error, match=match):
        import_qserve(tmp_path / "q", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    converted(tmp_path / "q", True, "zero")
    change(tmp_path / "q", X_s2_scales=None, X_s2_zeros=None, X_s1_szeros=torch.ones(256).half())
    with pytest.raises(CheckpointTensorError, match="mixed formats"):
        import_qserve(tmp_path / "q", tmp_path / "out")


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_pickle_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q").mkdir()
    write_config(tmp_path / "q")
    path = tmp_path / "q" / "pytorch_model.bin"
    torch.save({f"{UP}.qweight": _Payload()}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(SourceError, match="refused"):
        import_qserve(tmp_path / "q", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "state",
    [
        [torch.ones(2)],
        {f"{UP}.qweight": torch.ones(1, dtype=torch.int8).expand(1 << 20, 1 << 20)},
        {f"{UP}.qweight": torch.ones(2, 2).to_sparse()},
        {f"{UP}.qweight": torch.ones(2, 2, device="meta")},
        {"model.norm.weight": torch.ones(2)},
        {},
    ],
    ids=["list", "expanded", "sparse", "meta", "no linears", "empty"],
)
def test_other_pickles_are_refused(tmp_path: Path, state: Any) -> None:
    write_config(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError):
        import_qserve(tmp_path, tmp_path / "out")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(SourceError, match="holds no"):
        import_qserve(tmp_path, tmp_path / "out")
    for data in (b"", b"x" * 1000):
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(SourceError, match=r"cannot be read|refused"):
            import_qserve(tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError):
        import_qserve(tmp_path, tmp_path / "out")
    with pytest.raises(SourceError, match="no folder"):
        import_qserve(tmp_path / "nowhere", tmp_path / "out")


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    for name in ("a.bin", "b.bin"):
        torch.save({"x.qweight": torch.ones(1)}, tmp_path / name)
    with pytest.raises(SourceError, match=r"both a\.bin and b\.bin"):
        import_qserve(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("groups", [True, False])
def test_scale_pt_of_another_model_is_refused(tmp_path: Path, groups: bool) -> None:
    fake_quant_pair(tmp_path / "q", groups, "zero")
    write_config(tmp_path / "q")
    scales = torch.load(tmp_path / "q" / "scale.pt", weights_only=True)
    scales[f"{UP}.weight.scale.0"] *= 1.3
    torch.save(scales, tmp_path / "q" / "scale.pt")
    with pytest.raises(CheckpointValueError, match="don't belong together"):
        import_qserve(tmp_path / "q", tmp_path / "out")


def test_missing_norms_and_tied_heads(tmp_path: Path) -> None:
    converted(tmp_path / "q", False, "zero")
    change(tmp_path / "q", model__norm__weight=None, lm_head__weight=None)
    write_config(tmp_path / "q", tie_word_embeddings=True)
    result = import_qserve(tmp_path / "q", tmp_path / "out")
    checkpoint = PackedCheckpoint.open(result.path)
    assert torch.equal(checkpoint.get("model.norm.weight"), torch.ones(HIDDEN))
    assert torch.equal(
        checkpoint.get("lm_head.weight"), checkpoint.get("model.embed_tokens.weight")
    )
    assert checkpoint.raw_config["tie_word_embeddings"] is False
    assert len(result.notes) == 1
    assert "set to 1" in result.notes[0]


def test_real_norm_gains_are_kept_and_noted(tmp_path: Path) -> None:
    converted(tmp_path / "q", False, "zero")
    gain = torch.rand(HIDDEN).half()
    change(tmp_path / "q", model__norm__weight=gain)
    result = import_qserve(tmp_path / "q", tmp_path / "out")
    assert torch.equal(PackedCheckpoint.open(result.path).get("model.norm.weight"), gain.float())
    assert "ignores" in result.notes[0]


# --- export and round trips ---


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("scheme", [GROUPS, CHANNELS, INT8], ids=str)
def test_round_trip(tmp_path: Path, scheme: QuantScheme, file_format: Any) -> None:
    tensors = tiny_tensors(scheme, bias=True)
    ours = write_checkpoint(tmp_path / "ours", scheme, tensors)
    (ours / "tokenizer.json").write_text("{}")
    export = export_qserve(ours, tmp_path / "theirs", file_format=file_format)
    assert export.precision == f"w{scheme.weight.bits}a8{scheme.kv}"
    assert export.group_size == (scheme.weight.group_size or -1)
    assert not any("rounded" in warning for warning in export.warnings)
    assert (export.path / "tokenizer.json").exists()
    back = import_qserve(export.path, tmp_path / "back", kv=scheme.kv)
    checkpoint = PackedCheckpoint.open(back.path)
    assert checkpoint.scheme == scheme
    assert checkpoint.names() == sorted(tensors)
    for name, tensor in tensors.items():
        got = checkpoint.get(name)
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor), name


def test_exported_tensors(tmp_path: Path) -> None:
    ours = write_checkpoint(tmp_path / "ours", GROUPS, tiny_tensors(GROUPS))
    export = export_qserve(ours, tmp_path / "theirs")
    theirs = load_file(export.path / "model.safetensors")
    checkpoint = PackedCheckpoint.open(ours)
    weight = GroupWeight(**{f.name: checkpoint.get(f"{UP}.{f.name}") for f in fields(GroupWeight)})
    qweight = theirs[f"{UP}.qweight"].view(torch.uint8).flatten().tolist()
    scale, zero = theirs[f"{UP}.s2_scales"], theirs[f"{UP}.s2_zeros"]
    assert scale.dtype == zero.dtype == theirs[f"{UP}.qweight"].dtype == torch.int8
    assert scale.shape == zero.shape == (1, 256)
    w8 = weight.int8()
    for n, k in ((0, 0), (17, 5), (255, 127), (100, 64)):
        byte, nibble = tile_place(n, k, 128)
        code = qweight[byte] >> 4 * nibble & 15
        place = next(p for p in range(32) if stored_channel("kernel", p) == n % 32) + n // 32 * 32
        assert code * scale[0, place].item() + zero[0, place].item() == w8[n, k]
    assert torch.equal(theirs[f"{UP}.s1_scales"].float(), weight.channel_scale)
    config = json.loads((export.path / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "qoq",
        "wbits": 4,
        "group_size": 128,
    }
    assert config["torch_dtype"] == "float16"
    with pytest.raises(CheckpointVersionError, match="import-qserve"):
        PackedCheckpoint.open(export.path)


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_export_in_several_files(tmp_path: Path, file_format: Any) -> None:
    tensors = tiny_tensors(CHANNELS)
    ours = write_checkpoint(tmp_path / "ours", CHANNELS, tensors)
    export = export_qserve(
        ours, tmp_path / "theirs", file_format=file_format, max_shard_bytes=40_000
    )
    files = sorted(p for p in export.path.iterdir() if p.suffix == f".{file_format}")
    assert len(files) > 2
    stem = "model" if file_format == "safetensors" else "pytorch_model"
    assert files[0].name == f"{stem}-00001-of-{len(files):05d}.{file_format}"
    index = json.loads((export.path / f"{stem}.{file_format}.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in files}
    back = PackedCheckpoint.open(import_qserve(export.path, tmp_path / "back").path)
    assert all(torch.equal(back.get(n), t) for n, t in tensors.items())


def test_export_says_what_it_lost(tmp_path: Path) -> None:
    scheme = QuantScheme.parse("w4a8kv4-g128")  # int8 head
    tensors = tiny_tensors(scheme, half=False)
    ours = write_checkpoint(tmp_path / "ours", scheme, tensors)
    export = export_qserve(ours, tmp_path / "theirs")
    text = " ".join(export.warnings)
    assert "scales were rounded to fp16" in text
    assert "lm_head was written in fp16" in text
    back = PackedCheckpoint.open(import_qserve(export.path, tmp_path / "back").path)
    before, after = tensors[f"{UP}.channel_scale"], back.get(f"{UP}.channel_scale")
    assert torch.equal(after, before.half().float())
    assert not torch.equal(after, before)
    head = tensors["lm_head.codes"].float() * tensors["lm_head.scale"][:, None]
    assert torch.equal(back.get("lm_head.weight"), head.half())
    config = json.loads((ours / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": {"rope_type": "yarn"}}
    (ours / "config.json").write_text(json.dumps(config))
    text = " ".join(export_qserve(ours, tmp_path / "theirs2").warnings)
    assert "Llama and Mistral only" in text
    assert "rope_scaling" in text


@pytest.mark.parametrize(
    ("scheme", "extra", "manifest", "match"),
    [
        ("w4a8kv4-g32", {}, {}, "groups of 32"),
        ("w4a8k8v4-g128", {}, {}, "KV format k8v4"),
        ("w4a8-g128", {}, {}, "KV format kv16"),
        ("w4a16kv4-g128", {}, {}, "scheme w4a16kv4-g128"),
        (
            "w4a8kv4-g128",
            {"model.layers.0.self_attn.k_center": torch.zeros(2, 32)},
            {},
            "leaves key centering out",
        ),
        ("w4a8kv4-g128", {}, {"k_rotation": "hadamard"}, "--k-rotation"),
        ("w4a8kv4", {"model.norm.weight": torch.full((HIDDEN,), 1.5)}, {}, "norm gains"),
        ("w4a8kv4", {"model.layers.1.self_attn.q_norm.weight": torch.rand(9)}, {}, "q/k norms"),
    ],
)
def test_export_refuses(
    tmp_path: Path, scheme: str, extra: Tensors, manifest: dict[str, Any], match: str
) -> None:
    parsed = QuantScheme.parse(scheme)
    ours = write_checkpoint(tmp_path / "o", parsed, tiny_tensors(parsed) | extra, **manifest)
    with pytest.raises(UnsupportedModelError, match=match):
        export_qserve(ours, tmp_path / "theirs")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("value", [1e9, 1e-12])
def test_scales_beyond_fp16_are_refused(tmp_path: Path, value: float) -> None:
    tensors = tiny_tensors(GROUPS)
    tensors[f"{UP}.channel_scale"][5] = value
    ours = write_checkpoint(tmp_path / "o", GROUPS, tensors)
    with pytest.raises(CheckpointValueError, match="does not fit in fp16"):
        export_qserve(ours, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_odd_sizes_cannot_be_exported(tmp_path: Path) -> None:
    tensors = tiny_tensors(CHANNELS)
    tensors[f"{UP}.codes"] = tensors[f"{UP}.codes"][:250]
    tensors[f"{UP}.scale"] = tensors[f"{UP}.scale"][:250]
    tensors[f"{UP}.offset"] = tensors[f"{UP}.offset"][:250]
    with pytest.raises(CheckpointTensorError, match="250 x 128"):
        export_qserve(write_checkpoint(tmp_path / "o", CHANNELS, tensors), tmp_path / "theirs")


def test_outputs_are_not_overwritten_silently(tmp_path: Path) -> None:
    ours = write_checkpoint(tmp_path / "ours", CHANNELS, tiny_tensors(CHANNELS))
    theirs = export_qserve(ours, tmp_path / "theirs").path
    for call in (export_qserve, import_qserve):
        with pytest.raises(CheckpointError, match="exists already"):
            call(ours if call is export_qserve else theirs, theirs)
    assert export_qserve(ours, theirs, overwrite=True).path == theirs
    out = import_qserve(theirs, tmp_path / "back").path
    assert import_qserve(theirs, out, overwrite=True).path == out


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = write_checkpoint(tmp_path / "ours", CHANNELS, tiny_tensors(CHANNELS))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for file_format in ("safetensors", "bin"):
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="full"):
            export_qserve(ours, tmp_path / "theirs", file_format=file_format)  # type: ignore[arg-type]
        monkeypatch.undo()
        assert not (tmp_path / "theirs").exists()


def test_import_of_safetensors_with_int8_weights(tmp_path: Path) -> None:
    tensors = plain_tensors()
    truth = {}
    for name, shape in SHAPES.items():
        linear = f"model.layers.0.{name}"
        codes = torch.randint(-127, 128, shape).to(torch.int8)
        scale = torch.rand(shape[0]).half() + 0.1
        tensors |= {f"{linear}.weight": codes, f"{linear}.dequant_scale": scale}
        tensors["model.layers.0.self_attn.kv_scale_quant_orig"] = torch.ones(2)
        truth[linear] = codes.float() * scale.float()[:, None]
    save_file(tensors, tmp_path / "x.safetensors")
    write_config(tmp_path)
    result = import_qserve(tmp_path, tmp_path / "out", kv=KVFormat(8, 8))
    checkpoint = PackedCheckpoint.open(result.path)
    assert checkpoint.scheme == INT8
    for linear, values in truth.items():
        assert torch.equal(weights_of(checkpoint, linear), values)
