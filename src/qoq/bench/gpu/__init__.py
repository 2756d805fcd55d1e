"""What a GPU does with this package, checked and measured in one run (``qoq gpu-check``).

check         the parts one after the other, each in a process of its own; the file of results
worker        that process: one part, its rows as they come
parts         which parts there are, with their share of the time
clock         times of calls that take turns, from CUDA graphs
environment, ceilings, subnormal, tests, bits, gemm, attention, rows, model   the parts
"""
