"""The way of a weight, in reading order (QServe section 4). Nothing here runs in serving.

pipeline     quantize(): the whole way          recipe       which passes, with which numbers
plan         memory, disk and time beforehand   job          the partial folder, resuming
calibration  text -> token windows
replay       tokens through one block, on disk  statistics   what passes must know of activations
blocks       one block's passes in order        block        its tensors while they change
rotate       norms folded, streams rotated      keys         centering, SmoothAttention
outputs      output smoothing, reordering       linears      one weight: correct, round, pack
grids        scales and ranges                  rounding     GPTQ, coordinate descent
ends         embedding and lm_head          report       what happened, as numbers
"""
