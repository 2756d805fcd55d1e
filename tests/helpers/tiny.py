"""Tiny models and tokenizers in Hugging Face layout, built on the spot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

BOS, EOS, PAD = 0, 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def write_byte_tokenizer(
    folder: Path, *, template: str | None = TEMPLATE, added: Mapping[str, bool] | None = None
) -> int:
    """A byte-level BPE tokenizer (GPT-2, Llama-3, Qwen style); returns its vocabulary's size.

    ``added``: more tokens of their own, and whether they are special.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġ", "t")]
    tokens = alphabet + [a + b for a, b in merges]
    vocab = {token: 3 + i for i, token in enumerate(tokens)}
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    more = [AddedToken(t, special=special) for t, special in (added or {}).items()]
    _save(folder, tok, [*(AddedToken(t, special=True) for t in _SPECIAL), *more], template)
    return 3 + len(tokens) + len(more)


def write_fallback_tokenizer(folder: Path) -> int:
    """A BPE tokenizer with byte fallback that strips a text's first space (Llama-2 style)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    words = ["▁", "a", "b", "c", "d", "▁a", "▁b", "▁ab"]
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *byte_tokens, *words])}
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    tok = Tokenizer(models.BPE(vocab, merges, unk_token="<|pad|>", byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _save(folder, tok, [AddedToken(t, special=True) for t in _SPECIAL], None)
    return len(vocab)


_SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")


def _save(folder: Path, tok: Any, special: list[Any], template: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if tok.token_to_id(_SPECIAL[0]) is None:  # the vocabulary left ids 0..2 to them
        state = json.loads(tok.to_str())
        state["model"]["vocab"].update({t: i for i, t in enumerate(_SPECIAL)})
        tok = type(tok).from_str(json.dumps(state))
    tok.add_tokens(special)
    tok.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[BOS],
        "eos_token": _SPECIAL[EOS],
        "pad_token": _SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


# The config.json of a Llama, for decoders with weights of their own.
TWO_LAYERS: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def write_tiny_llama(
    folder: Path, *, seed: int = 0, tokenizer: Mapping[str, Any] | None = None, **overrides: Any
) -> Any:
    """A random Llama with a byte-level tokenizer in ``folder``; returns the transformers model.

    Its weights are large enough that greedy text varies; ``tokenizer`` are options of
    ``write_byte_tokenizer``, ``overrides`` go to LlamaConfig.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = write_byte_tokenizer(folder, **(tokenizer or {}))
    config: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": vocab_size,
        "max_position_embeddings": 128,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**config, **overrides})).float().eval()
    model.save_pretrained(folder)
    return model
