"""The one decoder, any precision: pre-norm blocks over a paged KV cache (QServe figure 8).

No line here names a bit width or a backend's kernel: a ``Linear`` says what must enter it, the
pages say how keys and values are stored, the ops choose their own implementation.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qoq.formats.hadamard import hadamard_matrix
from qoq.formats.kv import KVPages
from qoq.formats.scheme import QuantScheme
from qoq.kernels.act_quant import Activation, act_quant, rms_norm, rms_norm_quant, silu_mul_quant
from qoq.kernels.attention import attention
from qoq.kernels.kv_append import kv_append
from qoq.kernels.prepared import PreparedWeight
from qoq.kernels.threads import torch_stands_aside
from qoq.models.anatomy import EMBED, FINAL_NORM, INPUTS, LM_HEAD, layer_prefix
from qoq.models.batch import Batch
from qoq.models.config import ModelConfig
from qoq.models.layers import Get, Linear, load_linear
from qoq.models.rope import cos_sin

Observe = Callable[[Tensor, Tensor, Tensor], None]
"""Called with q [T, Hq, D], k and v [T, Hkv, D], after q/k norms and before RoPE."""


@dataclass(frozen=True)
class DecoderLayer:
    """One block: RMSNorm, attention, RMSNorm, SwiGLU MLP; the adds happen inside the next norm.

    Gains fp32: input_norm, post_norm [H]; q_norm, k_norm [D] or None (Qwen3). k_center fp32
    [Hkv, D] or None is subtracted from keys after RoPE; k_rotation fp32 [D, D] orthogonal or None
    turns q and k after that.
    """

    config: ModelConfig
    index: int
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    k_center: Tensor | None = None
    k_rotation: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        batch: Batch,
        pages: KVPages,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """x [T, H] = the previous block's output, not yet added to residual [T, H] (None before the
        first layer); cos, sin [T, D/2]. Returns the same pair, fp32, after this block.
        """
        entering, residual = self.attention_input(x, residual, backend=backend)
        entering = self.attend(entering, cos, sin, batch, pages, backend=backend)
        x = self.o(entering, backend=backend)
        entering, residual = self.mlp_input(x, residual, backend=backend)
        entering = self.mlp_hidden(entering, backend=backend)
        return self.down(entering, backend=backend), residual

    def attention_input(
        self, x: Tensor, residual: Tensor | None, *, backend: str = "auto"
    ) -> tuple[Activation, Tensor]:
        """What enters qkv [T, H], and the residual stream x has been added to."""
        eps, bits = self.config.rms_norm_eps, self.qkv.act_bits
        return rms_norm_quant(x, self.input_norm, eps, bits, residual, backend=backend)

    def attend(
        self,
        entering: Activation,
        cos: Tensor,
        sin: Tensor,
        batch: Batch,
        pages: KVPages,
        *,
        backend: str = "auto",
        observe: Observe | None = None,
    ) -> Activation:
        """What enters o_proj [T, Hq*D]; writes the tokens' keys and values into pages."""
        q, k, v = self._split_heads(self.qkv(entering, backend=backend))
        if observe:
            observe(q, k, v)
        q = kv_append(
            q,
            k,
            v,
            cos,
            sin,
            batch.slots,
            pages,
            self.k_center,
            self.k_rotation,
            backend=backend,
        )
        mixed = attention(
            q,
            pages,
            batch.page_table,
            batch.kv_lens,
            batch.cu_seqlens_q,
            self.config.sm_scale,
            self.config.sliding_window[self.index],
            backend=backend,
        )
        return act_quant(mixed.flatten(1), self.o.act_bits, backend=backend)

    def mlp_input(
        self, x: Tensor, residual: Tensor | None, *, backend: str = "auto"
    ) -> tuple[Activation, Tensor]:
        """What enters gate_up [T, H], and the residual stream x has been added to."""
        eps, bits = self.config.rms_norm_eps, self.gate_up.act_bits
        return rms_norm_quant(x, self.post_norm, eps, bits, residual, backend=backend)

    def mlp_hidden(self, entering: Activation, *, backend: str = "auto") -> Activation:
        """What enters down_proj [T, I]."""
        gate_up = self.gate_up(entering, backend=backend)
        return silu_mul_quant(gate_up, self.down.act_bits, backend=backend)

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (Hq + 2 Hkv) D] -> q [T, Hq, D] and k, v [T, Hkv, D], with q/k norms applied."""
        config = self.config
        heads = qkv.unflatten(1, (-1, config.head_dim))
        first, last = config.num_heads, config.num_heads + config.num_kv_heads
        q, k, v = heads[:, :first], heads[:, first:last], heads[:, last:]
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm, config.rms_norm_eps)
        if self.k_norm is not None:
            k = rms_norm(k, self.k_norm, config.rms_norm_eps)
        return q, k, v


@dataclass(frozen=True)
class Decoder:
    """Token ids to logits. embed [V, H] any float; layers; norm gain fp32 [H]; lm_head [V, H]."""

    config: ModelConfig
    embed: Tensor
    layers: Sequence[DecoderLayer]
    norm: Tensor
    lm_head: Linear

    def hidden(
        self,
        batch: Batch,
        kv: Sequence[KVPages],
        *,
        backend: str = "auto",
    ) -> Tensor:
        """Residual stream fp32 [T, H] after the last layer, before the final norm.

        ``kv`` holds one KVPages per layer, written in place.
        """
        with torch.no_grad():
            x = self.embed[batch.input_ids].to(torch.float32)
            cos, sin = cos_sin(self.config.rope, batch.positions)
            residual: Tensor | None = None
            for layer, pages in zip(self.layers, kv, strict=True):
                x, residual = layer(x, residual, cos, sin, batch, pages, backend=backend)
            return x if residual is None else x + residual

    def logits(self, hidden: Tensor, *, backend: str = "auto") -> Tensor:
        """fp32 [M, V] from rows [M, H] of the residual stream."""
        with torch.no_grad():
            eps = self.config.rms_norm_eps
            x, _ = rms_norm_quant(hidden, self.norm, eps, self.lm_head.act_bits, backend=backend)
            return self.lm_head(x, backend=backend)

    def __call__(
        self,
        batch: Batch,
        kv: Sequence[KVPages],
        rows: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> Tensor:
        """Logits fp32 [M, V] of the given rows (int64 [M]; None: all T); writes the cache."""
        with torch_stands_aside(self._is_prepared):
            hidden = self.hidden(batch, kv, backend=backend)
            return self.logits(hidden if rows is None else hidden[rows], backend=backend)

    @cached_property
    def _is_prepared(self) -> bool:
        """Whether every linear runs on kernels of our own: nothing heavy is left to torch."""
        linears = [each for at in self.layers for each in (at.qkv, at.o, at.gate_up, at.down)]
        return all(isinstance(each.weight, PreparedWeight) for each in (*linears, self.lm_head))


def build_layer(
    config: ModelConfig,
    scheme: QuantScheme,
    index: int,
    get: Get,
    k_rotation: Tensor | None = None,
    *,
    names: Container[str] = (),
    backend: str = "oracle",
) -> DecoderLayer:
    """Layer ``index`` from tensors by checkpoint name (``anatomy`` lists them).

    ``names`` tells whether the optional ``self_attn.k_center`` is there; packed weights are laid
    out for ``backend`` ("oracle": left as they are).
    """
    prefix = layer_prefix(index)

    def norm(name: str) -> Tensor:
        return get(f"{prefix}{name}.weight").to(torch.float32)

    def stacked(tap: str, bias: bool) -> Linear:
        parts = [prefix + name for name in INPUTS[tap]]
        return load_linear(scheme.weight, scheme.act_bits, parts, bias, get, backend)

    center = f"{prefix}self_attn.k_center"
    return DecoderLayer(
        config,
        index,
        input_norm=norm("input_layernorm"),
        qkv=stacked("qkv_proj", config.qkv_bias),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        o=stacked("o_proj", config.o_bias),
        post_norm=norm("post_attention_layernorm"),
        gate_up=stacked("gate_up_proj", config.mlp_bias),
        down=stacked("down_proj", config.mlp_bias),
        k_center=get(center).to(torch.float32) if center in names else None,
        k_rotation=k_rotation,
    )


def build_decoder(
    config: ModelConfig,
    scheme: QuantScheme,
    get: Get,
    k_rotation: bool = False,
    *,
    names: Container[str] = (),
    backend: str = "oracle",
) -> Decoder:
    """The whole decoder; ``k_rotation`` adds the Hadamard turn of q and k over head_dim.

    A tied 16-bit head is the embedding itself, shared and not copied. Packed weights are laid out
    for ``backend`` one by one, so the model is never in memory twice.
    """
    embed = get(EMBED)
    rotation = None
    if k_rotation:
        rotation = hadamard_matrix(config.head_dim).to(embed.device, torch.float32)
    if config.tie_word_embeddings and scheme.lm_head.bits == 16:
        embed = embed.to(torch.float32)
        head = Linear(embed, None, 16)
    else:
        act_bits = 16 if scheme.lm_head.bits == 16 else scheme.act_bits
        head = load_linear(scheme.lm_head, act_bits, [LM_HEAD], False, get, backend)
    return Decoder(
        config,
        embed,
        [
            build_layer(config, scheme, i, get, rotation, names=names, backend=backend)
            for i in range(config.num_layers)
        ],
        get(FINAL_NORM).to(torch.float32),
        head,
    )
