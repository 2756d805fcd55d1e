"""Triton twins of the ops, for NVIDIA GPUs from compute capability 8.0 (A100, RTX 30) on."""
