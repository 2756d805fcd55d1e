"""Write a GGUF of random Q4_0 codes in the shapes of a config.json; run in llama.cpp's environment.

As llama-quantize writes a Llama in Q4_0: the embedding, which is also the head where the two are
tied, and the head of its own otherwise, are Q6_K. It has no tokenizer: ids go in and out.

    python gguf_model.py CONFIG.JSON OUT.gguf
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Q4_0_BLOCK, Q6_K_BLOCK = 32, 256  # weights per block
STEP = 0.02 / 4  # of a 4-bit code: weights of ordinary size


def q4_0(rows: int, columns: int, draw: np.random.Generator) -> Bytes:
    """Random rows of Q4_0 blocks: an f16 step, then 32 codes of 4 bits."""
    blocks = draw.integers(0, 256, (rows, columns // Q4_0_BLOCK, 18), dtype=np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(STEP).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def q6_k(rows: int, columns: int, draw: np.random.Generator) -> Bytes:
    """Random rows of Q6_K blocks: 256 codes of 6 bits, 16 scales of 8 bits, an f16 step."""
    blocks = draw.integers(0, 256, (rows, columns // Q6_K_BLOCK, 210), dtype=np.uint8)
    blocks[..., 192:208] = draw.integers(32, 64, blocks[..., 192:208].shape, dtype=np.uint8)
    blocks[..., 208:] = np.frombuffer(np.float16(STEP / 4 / 48).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(config: dict[str, Any], path: Path) -> None:
    """The file of a Llama with this Hugging Face config."""
    if config["model_type"] != "llama":
        sys.exit(f"Only Llama shapes can be written for llama.cpp, not {config['model_type']!r}.")
    hidden, inner, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    heads, kv_heads, dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    vocab = config["vocab_size"]
    writer = GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    draw = np.random.default_rng(0)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    def linear(name: str, rows: int, columns: int) -> None:
        codes = q4_0(rows, columns, draw)
        writer.add_tensor(name, codes, raw_dtype=GGMLQuantizationType.Q4_0)

    def large(name: str) -> None:
        codes = q6_k(vocab, hidden, draw)
        writer.add_tensor(name, codes, raw_dtype=GGMLQuantizationType.Q6_K)

    large("token_embd.weight")
    if not config["tie_word_embeddings"]:
        large("output.weight")
    norm("output_norm.weight")
    for layer in range(layers):
        prefix = f"blk.{layer}"
        norm(f"{prefix}.attn_norm.weight")
        norm(f"{prefix}.ffn_norm.weight")
        linear(f"{prefix}.attn_q.weight", heads * dim, hidden)
        linear(f"{prefix}.attn_k.weight", kv_heads * dim, hidden)
        linear(f"{prefix}.attn_v.weight", kv_heads * dim, hidden)
        linear(f"{prefix}.attn_output.weight", hidden, heads * dim)
        linear(f"{prefix}.ffn_gate.weight", inner, hidden)
        linear(f"{prefix}.ffn_up.weight", inner, hidden)
        linear(f"{prefix}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
