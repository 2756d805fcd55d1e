"""The network both ways share: one decoder for every supported family, in any precision.

config    ModelConfig.from_hf, the sole reader of HF keys    families  what is supported, and why not
rope      cosines and sines, every RoPE type                 anatomy   names, shapes, who feeds whom
layers    Linear and how its tensors are found               batch     the tensors of one forward pass
decoder   the decoder and its blocks                         load      a folder to a decoder
"""
