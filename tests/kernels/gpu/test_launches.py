"""A step's launches, without a GPU: how many there are, and that no number makes another kernel.

The device is torch's "meta", whose tensors have addresses within their memory, but no numbers.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qoq.bench.shapes import raw_config
from qoq.engine.rows import _columns
from qoq.formats.scheme import QuantScheme
from qoq.kernels.dispatch import TWINS, Twin
from qoq.kernels.gpu import act_quant, attention, kv_append, linear, sample, tiles
from qoq.kernels.gpu.append import append
from qoq.kernels.gpu.fold import merge
from qoq.kernels.gpu.product import product
from qoq.kernels.gpu.walk import attend
from qoq.kernels.sample import SamplingBatch
from qoq.kvcache.pool import KVPool
from qoq.models.anatomy import packed_tensors
from qoq.models.batch import BatchShape
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder, build_decoder
from qoq.models.graphs import page_sizes, prompt_sizes, sequence_sizes

META = torch.device("meta")
MODULES = (act_quant, attention, kv_append, linear, sample)
LAYERS, PAGES = 2, 4096
SIZES = {"num_hidden_layers": LAYERS, "vocab_size": 1000}
PREFILL = [(17, 1, 1), (18, 2, 3), (300, 3, 7), (301, 2, 40), (2048, 5, 17)]
DECODE = [(n, n, pages) for n in (1, 2, 3, 8, 24, 64, 65) for pages in (1, 3, 16, 64)]


class Launches:
    """Kernels whose launches are written down instead: (name, constants, what is specialized)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = []

    def __call__(self, kernel: Any) -> "Launches._Kernel":
        return Launches._Kernel(kernel, self)

    class _Kernel:
        def __init__(self, kernel: Any, launches: "Launches") -> None:
            self._kernel, self._launches = kernel, launches

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert all(axis > 0 for axis in grid)
            assert all(axis < 1 << 16 for axis in grid[1:])

            def launch(*args: Any, **named: Any) -> None:
                assert all(x.device == META for x in tree_leaves((args, named)) if is_tensor(x))
                self._launches.seen.append(compiled(self._kernel, args, named))

            return launch


def is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def compiled(
    kernel: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[str, tuple[Any, ...], tuple[Any, ...]]:
    """What Triton compiles a launch for: its name and constants, and what it sees of the rest.

    Integers that are 1 are constants; of others, and of addresses, it matters whether 16 divides
    them, unless a kernel says that it does not.
    """
    options = getattr(kernel, "kwargs", None) or vars(kernel)  # interpreted, or not
    plain = set(options["do_not_specialize"] or ())
    unaligned = plain | set(options["do_not_specialize_on_alignment"] or ())
    parameters = inspect.signature(kernel.fn).parameters
    given = dict(zip(parameters, args, strict=False)) | named
    constants: list[Any] = []
    special: list[Any] = []
    for name, parameter in parameters.items():
        value = given.pop(name)
        if value is None or "constexpr" in str(parameter.annotation):
            constants.append((name, value))
        elif isinstance(value, Tensor):
            constants.append((name, value.dtype))
            if name not in unaligned:
                place = value.storage_offset() * value.itemsize
                special.append((name, place % 16 == 0))
        elif isinstance(value, int) and name not in plain:
            special.append((name, value == 1, value % 16 == 0))
    return kernel.fn.__name__, (*constants, *sorted(given.items())), tuple(special)


class OnDevice(TorchDispatchMode):
    """Fails where an op takes or makes a tensor elsewhere; counts those that do some work."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor):
                assert leaf.device == META, f"{func} on {leaf.device}"
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "_unsafe_view"):
            self.work[name] += 1
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The twins take meta tensors, as an H200 would, and launch nothing."""
    found = Launches()
    for op, twins in TWINS.items():
        module = next(twin.module for twin in twins if twin.backend == "gpu")
        monkeypatch.setitem(TWINS, op, (Twin("gpu", module),))
    for module in MODULES:
        monkeypatch.setattr(module, "unsupported_device", lambda where: None)
    for module in (act_quant, sample):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            if name != "_kernel":
                monkeypatch.setattr(module, name, found(getattr(module, name)))
    monkeypatch.setattr(linear, "product", found(product))
    monkeypatch.setattr(attention, "_kernels", lambda: (found(attend), found(merge), False))
    monkeypatch.setattr(attention, "processors", lambda device: 132)
    monkeypatch.setattr(kv_append, "_kernel", lambda: found(append))
    monkeypatch.setattr(tiles, "_check", lambda *_: None)  # reads codes, once, at load
    return found


def model_of(scheme: QuantScheme, **changed: Any) -> tuple[Decoder, KVPool]:
    config = ModelConfig.from_hf({**raw_config("llama-3-8b"), **SIZES, **changed})
    expected = packed_tensors(config, scheme, k_center=True)

    def get(name: str) -> Tensor:
        shape, dtype = expected[name]
        return torch.empty(shape, dtype=dtype or torch.bfloat16, device=META)

    decoder = build_decoder(config, scheme, get, True, names=set(expected), backend="gpu")
    heads, dim = config.num_kv_heads, config.head_dim
    return decoder, KVPool(scheme.kv, LAYERS, PAGES, heads, 64, dim, META)


def step(decoder: Decoder, pool: KVPool, tokens: int, sequences: int, pages: int) -> None:
    """Logits of each sequence's last row, and a draw from them."""
    shape = BatchShape(tokens, sequences, pages)
    batch = shape.views(shape.flat(META))
    rows = None
    if tokens > sequences:
        rows = torch.empty(sequences, dtype=torch.int64, device=META)
    logits = decoder(batch, pool.layers, rows, backend="gpu")
    columns = _columns(torch.empty(9 * len(logits), dtype=torch.int32, device=META))
    sample.sample(logits, SamplingBatch(*columns))


@pytest.mark.parametrize("scheme", ["w4a8kv4-g128", "w4a8kv4", "w8a8kv8"])
def test_neither_lengths_nor_addresses_make_a_kernel(launches: Launches, scheme: str) -> None:
    """Or a server would compile, for seconds, whenever a batch has a new size."""
    decoder, pool = model_of(QuantScheme.parse(scheme))
    for tokens, sequences, pages in [*PREFILL, *DECODE]:
        step(decoder, pool, tokens, sequences, pages)
    kernels: dict[tuple[Any, ...], set[Any]] = defaultdict(set)
    for name, constants, special in launches.seen:
        kernels[name, constants].add(special)
    several = {key[0]: found for key, found in kernels.items() if len(found) > 1}
    assert not several
    assert len(kernels) < 70


def test_an_engine_that_is_ready_has_compiled_all(launches: Launches) -> None:
    """What its start runs (``Engine.record``) needs every kernel that later steps do."""
    decoder, pool = model_of(QuantScheme.parse("w4a8kv4-g128"))
    pages = 2048
    for size in sequence_sizes(64):
        for wide in page_sizes(pages):
            step(decoder, pool, size, size, wide)
    for tokens in prompt_sizes(2048):
        for wide in (1, pages):
            step(decoder, pool, tokens, 1, wide)
    ready = {(name, constants) for name, constants, _ in launches.seen}
    launches.seen.clear()
    for tokens, sequences, wide in [*PREFILL, *DECODE, (2048, 64, 2048), (70, 64, 500)]:
        if sequences <= 64:
            step(decoder, pool, tokens, sequences, wide)
    assert not {(name, constants) for name, constants, _ in launches.seen} - ready


@pytest.mark.parametrize("window", [None, 4096])
def test_what_a_decode_step_launches(launches: Launches, window: int | None) -> None:
    changed: dict[str, Any] = {}
    if window:
        family = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        changed = {**family, "sliding_window": window}
    decoder, pool = model_of(QuantScheme.parse("w4a8kv4-g128"), **changed)
    step(decoder, pool, 64, 64, 64)  # what is made once may come from the CPU
    launches.seen.clear()
    with OnDevice() as ops:
        step(decoder, pool, 64, 64, 64)
    layer = [
        *("rms_norm_quant_kernel", "product", "append", "attend", "merge", "act_quant_kernel"),
        *("product", "rms_norm_quant_kernel", "product", "silu_mul_quant_kernel", "product"),
    ]
    ends = ["rms_norm_quant_kernel", "product", "survey_kernel", "draw_kernel"]
    assert [name for name, *_ in launches.seen] == [*LAYERS * layer, *ends]
    # Torch's own kernels: the embedding and angles before the layers, a sum behind them.
    assert sum(ops.work.values()) < 20, ops.work
