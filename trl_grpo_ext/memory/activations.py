"""What depends on the tokens: the sampler's cache, and what a log-prob pass keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_grpo_ext.memory.shape import ModelShape, attention_widths

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a batch of completions, each of full length.

    Attributes:
        num_completions: In the batch.
        num_prompts: Groups that they belong to.
        prompt: Tokens of a prompt.
        completion: Tokens of a completion.

    Example:
        >>> tokens = Tokens(num_completions=8, num_prompts=1, prompt=100, completion=10)
        >>> tokens.padded, tokens.cached_once, tokens.packed
        (880, 180, 172)
    """

    num_completions: int
    num_prompts: int
    prompt: int
    completion: int

    @property
    def padded(self) -> int:
        """One row a completion, its prompt in front."""
        return self.num_completions * (self.prompt + self.completion)

    @property
    def cached_once(self) -> int:
        """Each prompt once, then its completions: what the sampler caches."""
        return self.num_prompts * self.prompt + self.num_completions * self.completion

    @property
    def packed(self) -> int:
        """The row of a shared-prefix pass: the last token of a completion predicts nothing."""
        return self.cached_once - self.num_completions


def kv_cache_bytes(config: PreTrainedConfig, *, num_tokens: int, dtype_bytes: int) -> int:
    """Return the bytes of the keys and values that full attention keeps.

    Tokens x layers x 2 x key-value heads x head width x bytes.

    Args:
        config: Sliding-window and latent attention keep less than this.
        num_tokens: Of all sequences of the batch together.
        dtype_bytes: Bytes of one cache entry.

    References:
        Ainslie et al. 2023, grouped-query attention: only the key-value heads count,
        arXiv:2305.13245.
    """
    text = config.get_text_config()
    _, kv_width = attention_widths(text)
    return num_tokens * int(text.num_hidden_layers) * 2 * kv_width * dtype_bytes


def activation_bytes(
    shape: ModelShape,
    *,
    tokens: Tokens,
    weight_bytes: int,
    compute_bytes: int,
    gradient_checkpointing: bool,
    shared_prefix: bool = False,
) -> int:
    r"""Return roughly the bytes that one log-prob pass keeps for the backward pass.

    .. math:: n (4 + w) h + i\,b\,h + 2 b (q + k) + 4 b f + \dots

    a token and layer, for hidden width h, query width q, key-value width k, MLP width f, n norms, w
    bytes a weight, b bytes an activation, and i inputs of linear layers: 2, or 5 under autocast,
    which casts for each layer by itself. Terms for norms of queries and keys, for experts and for
    the final norm stand in the code. Counted on transformers' models with
    ``torch.autograd.graph.saved_tensors_hooks`` and SDPA, in the manner of [1], which has no gated
    MLP. Attention scores are not kept (SDPA, flash attention), and neither are logits: TRL's fused
    LM head works in tiles.

    Args:
        shape: Its MLP is taken to be gated.
        tokens: Of one micro-batch.
        weight_bytes: Bytes of one weight: 4 under autocast, where ``compute_bytes`` is 2.
        compute_bytes: Bytes of one activation.
        gradient_checkpointing: If set, each layer keeps its input only, and one layer at a time
            is recomputed.
        shared_prefix: Whether each prompt is computed once a group. Attention then keeps the
            prompt's keys and values once a completion, beside each completion's own.

    References:
        [1] Korthikanti et al. 2022, section 4.1, arXiv:2205.05198.
    """
    num_tokens = tokens.packed if shared_prefix else tokens.padded
    layer = num_tokens * _layer_token_bytes(shape, weight=weight_bytes, compute=compute_bytes)
    if shared_prefix:
        layer += compute_bytes * _shared_prefix_width(shape, tokens)
    last = num_tokens * shape.hidden_width * (4 + weight_bytes + compute_bytes)  # the final norm
    if not gradient_checkpointing:
        return shape.num_layers * layer + last
    return shape.num_layers * num_tokens * shape.hidden_width * weight_bytes + layer + last


def _layer_token_bytes(shape: ModelShape, *, weight: int, compute: int) -> int:
    hidden, attention = shape.hidden_width, shape.query_width + shape.kv_width
    norm, query_norm = (4, 4) if shape.has_float32_norms else (weight, compute)
    norms = shape.num_norms * (4 + norm) * hidden
    if shape.has_query_norm:
        norms += (4 + query_norm) * attention
    softmax = 4 * shape.num_heads
    linear = 2 * attention + 4 * shape.mlp_width + _num_inputs(shape, weight, compute) * hidden
    # Experts compute in the dtype of their weights: autocast does not reach the grouped product.
    experts = 4 * shape.expert_width + 2 * shape.num_experts_per_token * hidden
    return norms + softmax + compute * linear + weight * experts


def _num_inputs(shape: ModelShape, weight: int, compute: int) -> int:
    if weight == compute:
        return 2  # of the attention, of the MLP
    return 3 + (2 if shape.mlp_width else 1)  # queries, keys, values; gate and up, or the router


def _shared_prefix_width(shape: ModelShape, tokens: Tokens) -> int:
    """Numbers that a layer keeps besides: keys and values side by side, and joined outputs."""
    rows = tokens.num_completions * (tokens.prompt + tokens.completion - 1)
    return 2 * rows * shape.kv_width + tokens.packed * shape.query_width
