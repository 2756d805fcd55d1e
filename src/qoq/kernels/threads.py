"""One pool of threads at a time: torch's own stand aside where the kernels' pool does the work.

After each parallel region torch's OpenMP threads spin for milliseconds, in case another one comes.
A gather of a few rows is enough to start them, and then every kernel of the step shares its cores
with threads that do nothing (measured on 2 cores: a decoding step of 60 ms instead of 46).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_stands_aside(aside: bool = True) -> Iterator[None]:
    """Torch uses one thread inside, if ``aside``; the calling thread's setting comes back after."""
    before = torch.get_num_threads()
    if not aside or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
