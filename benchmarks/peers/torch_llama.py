"""A minimal Llama of random weights on aten's 4-bit linears, for peer_torch.py."""

from dataclasses import dataclass

import torch
from common import Job
from torch import Tensor
from torch.nn import functional as F

GROUP = 128
CHUNK = 2048  # tokens of a step at most, while prompts are read


@dataclass
class Int4Linear:
    """Random codes [n, k] in the layout of the CPU's int4 product, a scale and offset a group."""

    weight: Tensor
    scales: Tensor

    @classmethod
    def random(cls, n: int, k: int) -> "Int4Linear":
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        scales = torch.zeros(k // GROUP, n, 2, dtype=torch.bfloat16)
        scales[..., 0] = 0.02 / 4
        return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), scales)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, GROUP, self.scales)
        return y


class Layer:
    """One decoder layer with its keys and values [batch, kv heads, length, dim]."""

    def __init__(self, job: Job) -> None:
        config = job.config
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim, hidden = config["head_dim"], config["hidden_size"]
        inner = config["intermediate_size"]
        self.qkv = Int4Linear.random((self.heads + 2 * self.kv_heads) * self.dim, hidden)
        self.out = Int4Linear.random(hidden, self.heads * self.dim)
        self.gate_up = Int4Linear.random(2 * inner, hidden)
        self.down = Int4Linear.random(hidden, inner)
        self.norm = torch.ones(hidden, dtype=torch.bfloat16)
        shape = (job.batch, self.kv_heads, job.prompt_len + job.output_len, self.dim)
        self.keys = torch.zeros(shape, dtype=torch.bfloat16)
        self.values = torch.zeros(shape, dtype=torch.bfloat16)

    def __call__(self, x: Tensor, rows: slice, start: int, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        normed = F.rms_norm(x, (hidden,), self.norm, 1e-5)
        heads = self.qkv(normed.reshape(-1, hidden)).view(batch, length, -1, self.dim)
        q, k, v = heads.transpose(1, 2).split([self.heads, self.kv_heads, self.kv_heads], 1)
        end = start + length
        self.keys[rows, :, start:end] = rotate(k, cos, sin)
        self.values[rows, :, start:end] = v
        mixed = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            self.keys[rows, :, :end],
            self.values[rows, :, :end],
            is_causal=length > 1,  # a prompt is read in one piece, from position 0
            enable_gqa=True,
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch * length, -1)).view_as(x)
        normed = F.rms_norm(x, (hidden,), self.norm, 1e-5)
        gate, up = self.gate_up(normed.reshape(-1, hidden)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up).view_as(x)


class Llama:
    """A decoder of a config's shapes with random weights, and the state of one batch."""

    def __init__(self, job: Job) -> None:
        config = job.config
        vocab, hidden, dim = config["vocab_size"], config["hidden_size"], config["head_dim"]
        self.job = job
        self.embed = torch.randn(vocab, hidden, dtype=torch.bfloat16) * 0.02
        self.head = torch.randint(-127, 128, (vocab, hidden), dtype=torch.int8)
        self.head_scale = torch.full((vocab,), 0.07 / 127, dtype=torch.bfloat16)
        self.layers = [Layer(job) for _ in range(config["num_hidden_layers"])]
        inverse = config["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
        angles = torch.arange(job.prompt_len + job.output_len)[:, None] * inverse
        self.cos = angles.cos().repeat(1, 2).to(torch.bfloat16)
        self.sin = angles.sin().repeat(1, 2).to(torch.bfloat16)

    def next(self, ids: Tensor, rows: slice, start: int) -> Tensor:
        """The likeliest token after ``ids`` [batch, length], which begin at position ``start``."""
        x = self.embed[ids]
        where = slice(start, start + ids.shape[1])
        for layer in self.layers:
            x = layer(x, rows, start, self.cos[where], self.sin[where])
        last = F.rms_norm(x[:, -1], (x.shape[-1],), self.layers[0].norm, 1e-5)
        return torch._weight_int8pack_mm(last, self.head, self.head_scale).argmax(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the last dimension, halves paired."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Batch:
    """Steps one batch: prompts first, several at a time, then a token for each."""

    def __init__(self, model: Llama, prompts: list[list[int]]) -> None:
        self.model, self.prompts = model, torch.tensor(prompts)
        self.last = torch.zeros(len(prompts), dtype=torch.long)
        self.read = 0  # prompts
        self.made = 0  # tokens of each, when all prompts are read

    def step(self) -> dict[int, int]:
        count, length = self.prompts.shape
        if self.read < count:
            rows = slice(self.read, min(count, self.read + max(1, CHUNK // length)))
            self.last[rows] = self.model.next(self.prompts[rows], rows, 0)
            self.read, self.made = rows.stop, 1
            return dict.fromkeys(range(self.read), 1)
        start = length + self.made - 1
        self.last = self.model.next(self.last[:, None], slice(0, count), start)
        self.made += 1
        return dict.fromkeys(range(count), self.made)
