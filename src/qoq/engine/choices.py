"""Several texts for one prompt: as many requests, each with a seed of its own."""

from dataclasses import replace

from qoq.engine.request import SamplingParams

_MASK = (1 << 64) - 1


def choices(params: SamplingParams) -> list[SamplingParams]:
    """``params`` with n = 1 for each of its n texts.

    The first keeps the seed, so it is the text that n = 1 gives; the others' follow from the seed
    and their index alone. Without a seed each draws a fresh one.
    """
    return [
        replace(params, n=1, seed=None if params.seed is None else _seed(params.seed, index))
        for index in range(params.n)
    ]


def _seed(seed: int, index: int) -> int:
    """From 0 to 2**63 - 1; splitmix64 of both, so that neighbouring seeds share no choices."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1
