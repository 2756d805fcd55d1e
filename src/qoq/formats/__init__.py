"""What a low-bit number is: schemes, packing and the integer formats. Pure maths, no devices.

scheme       QuantScheme and its spelling            packing      nibbles in bytes
affine       code * scale + offset                   progressive  two-level groups that stay in int8
activation   int8 per token                          weights      the three packed weight types
kv           KV pages and per-head codes
"""
