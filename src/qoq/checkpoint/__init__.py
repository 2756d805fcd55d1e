"""How numbers rest on disk: Hugging Face sources, our packed checkpoints, QServe's.

hf        full-precision folder -> tensors       packed, writer   our format, read and written
shard     one safetensors file                   manifest         quantization_config
values    what a packed tensor may hold          files, partial   safe names; OUT by one rename
qserve*   QServe/OmniServe import and export     card             the README beside a checkpoint
"""
