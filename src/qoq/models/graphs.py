"""DecodeGraphs: a decode step recorded once for each size, and replayed from then on.

A GPU runs the kernels of such a step faster than Python can launch them. A recording holds their
launches with all addresses and sizes, so a step's batch is written into memory that stays where it
is and padded to the next size that was recorded: rows of no sequence, sequences without rows.
"""

import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from qoq.models.batch import Batch, BatchShape

Step = Callable[[Batch], Tensor]
"""Logits fp32 [T, V] of a batch; writes its keys and values."""
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Runs something and returns what runs it again; each result overwrites the one before."""
Progress = Callable[[int, int], None]

_FEWEST_PAGES = 16


class DecodeGraphs:
    """Decode steps of up to ``sequences`` rows, a sequence each, of up to ``pages`` pages.

    A size is recorded when it is first met, or all of them by ``record_all``. Not for several
    threads at once.
    """

    def __init__(
        self,
        step: Step,
        sequences: int,
        pages: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self._step = step
        self._device = device
        self._record = record
        self._sequences = sequence_sizes(sequences)
        self._pages = page_sizes(pages)
        self._recorded: dict[BatchShape, Callable[[], Tensor]] = {}

    def shape(self, sequences: int, pages: int) -> BatchShape | None:
        """The smallest size that holds such a batch; None: it must run as it is."""
        rows = next((size for size in self._sequences if size >= sequences), None)
        wide = next((size for size in self._pages if size >= pages), None)
        return None if rows is None or wide is None else BatchShape(rows, rows, wide)

    def run(self, shape: BatchShape, fill: Callable[[Batch], None]) -> Tensor:
        """Logits fp32 [T, V] of the batch that ``fill`` writes, in CPU memory, over one of this
        shape. The next run overwrites them.
        """
        replay = self._recording(shape)
        # New pinned memory each time: what was there may still be on its way to the GPU.
        host = shape.flat(pinned=self._device.type == "cuda")
        fill(shape.views(host))
        self._memory[: len(host)].copy_(host, non_blocking=True)
        return replay()

    def record_all(self, progress: Progress = lambda done, total: None) -> None:
        """Record every size, the largest first: smaller ones then fit into its memory."""
        shapes = [BatchShape(n, n, pages) for pages in self._pages for n in self._sequences]
        for done, shape in enumerate(reversed(shapes)):
            progress(done, len(shapes))
            self._recording(shape)
        progress(len(shapes), len(shapes))

    def _recording(self, shape: BatchShape) -> Callable[[], Tensor]:
        found = self._recorded.get(shape)
        if found is None:
            padding = shape.padding()
            memory = self._memory[: len(padding)]
            memory.copy_(padding)  # recording runs the step, which must write no keys
            batch = shape.views(memory)
            found = self._recorded[shape] = self._record(lambda: self._step(batch))
        return found

    @cached_property
    def _memory(self) -> Tensor:
        """Where every size has its batch, one at a time."""
        largest = BatchShape(self._sequences[-1], self._sequences[-1], self._pages[-1])
        return largest.flat(self._device).zero_()


def sequence_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, then 16, 24, 32, 48, 64, 96, ... below ``most``, and ``most``."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        whole = 2 ** sizes[-1].bit_length()
        sizes += [whole, 3 * whole // 2]
    return _up_to(most, sizes)


def prompt_sizes(most: int) -> list[int]:
    """Rows of prompts, 16, 32, 64, ... below ``most``, and ``most``: kernels for all are then
    compiled, as they are made for powers of two.
    """
    return _up_to(most, [1 << i for i in range(4, most.bit_length())])


def page_sizes(most: int) -> list[int]:
    """16, 64, 256, ... below ``most``, and ``most``."""
    sizes = [_FEWEST_PAGES]
    while sizes[-1] < most:
        sizes.append(4 * sizes[-1])
    return _up_to(most, sizes)


def _up_to(most: int, sizes: list[int]) -> list[int]:
    """Those below ``most``, and ``most``."""
    return [*(size for size in sizes if size < most), most]


def recorder(device: torch.device) -> Record | None:
    """How steps are recorded on a device: as CUDA graphs on a GPU, not at all elsewhere."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory: only one may run at a time.

    A step that waits for the GPU, as those of torch oracles do, cannot be recorded. It then runs as
    it is, with a warning.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._can: bool | None = None  # not known yet

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See ``Record``."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels and makes what is made once, which a graph cannot hold
            if self._can is None:
                self._can = _never_waits(run)
        torch.cuda.current_stream().wait_stream(self._stream)
        if not self._can:
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _never_waits(run: Callable[[], Tensor]) -> bool:
    """Whether a step can be recorded. Found out beforehand: a recording that fails leaves torch's
    allocator in the midst of it.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        warnings.warn(f"decode steps cannot be recorded as CUDA graphs ({error})", stacklevel=2)
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return True
