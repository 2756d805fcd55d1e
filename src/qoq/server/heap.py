"""Memory that was freed, given back to the system."""

import ctypes


def return_free_memory() -> None:
    """Give back what the C library keeps of freed memory; nothing where it cannot be asked to.

    glibc keeps the pages between pieces that are still in use, so after hours of requests of all
    sizes a process looks as large as its worst minute. This takes some ten milliseconds for 100 MB,
    during which other threads may go on but must wait where they allocate.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
