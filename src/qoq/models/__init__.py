"""The network both ways share: one decoder for every supported family, in any precision.

config     ModelConfig.from_hf, the sole reader of HF keys
families   what is supported, and why the rest is not
fields     typed readers of config.json values
rope       cosines and sines of every RoPE type
anatomy    names and shapes; which linears read and feed which
layers     Linear, and how its tensors are found
batch      the tensors of one forward pass
decoder    the decoder and its blocks
load       from a folder to a decoder
"""
