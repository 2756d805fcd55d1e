"""How numbers meet: one op is one stem in up to three places, and this package holds the contracts.

``kernels/x.py`` is the contract (the docstring) and the torch oracle (the truth, any device);
its fast twins live in ``kernels/gpu/x.py`` (Triton) and ``kernels/cpu/x.cpp`` (C++) and enter the
table in ``dispatch``. A twin must equal its oracle: to the bit in integers, within float tolerance
after the epilogue.

act_quant   float rows -> int8 rows, alone or after RMSNorm or SiLU-mul
linear      int8 rows x packed weights -> float
kv_append   RoPE, center, rotate, quantize keys and values into pages
attention   ragged causal attention that reads the quantized pages
sample      logits -> ids, seeded per request
"""
