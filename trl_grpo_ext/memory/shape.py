"""The shape of a language model: what its configuration says about memory.

The model is built on torch's meta device, so nothing is allocated and no weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Matrix:
    """One weight matrix, or those of the experts of a layer.

    Attributes:
        num_outputs: Rows.
        num_inputs: Columns.
        num_experts: How many there are; 1 for a linear layer.
        is_expert: Whether they are experts, in one 3-D parameter.
    """

    num_outputs: int
    num_inputs: int
    num_experts: int = 1
    is_expert: bool = False

    @property
    def size(self) -> int:
        """Weights of one matrix."""
        return self.num_outputs * self.num_inputs

    @property
    def num_parameters(self) -> int:
        """Weights of all of them."""
        return self.size * self.num_experts


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model's memory depends on. Parameters that are shared count once.

    Attributes:
        num_parameters: All parameters.
        matrices: Linear layers but the output head, and experts.
        num_layers: Decoder layers.
        largest_layer: Parameters of the largest decoder layer.
        outside_layers: Parameters that belong to no decoder layer.
        tables: The input embedding, and the output head where it is not the same.
        hidden_width: Of the residual stream.
        query_width: Of all heads together.
        kv_width: Of all key-value heads together.
        num_heads: Attention heads.
        mlp_width: Inner width of the dense part of the MLP; 0 where there are only experts.
        expert_width: Inner width of the experts that one token goes through, summed.
        num_experts_per_token: How many those are.
        num_norms: Norms over the residual stream, a layer.
        has_query_norm: Whether queries and keys are normed.
        has_float32_norms: Whether norms scale in float32, whatever the dtype (Gemma).
    """

    num_parameters: int
    matrices: tuple[Matrix, ...]
    num_layers: int
    largest_layer: int
    outside_layers: int
    tables: tuple[Matrix, ...]
    hidden_width: int
    query_width: int
    kv_width: int
    num_heads: int
    mlp_width: int
    expert_width: int
    num_experts_per_token: int
    num_norms: int
    has_query_norm: bool
    has_float32_norms: bool

    @property
    def cache_width(self) -> int:
        """Numbers that the key-value cache holds for a token."""
        return 2 * self.num_layers * self.kv_width

    @property
    def num_in_matrices(self) -> int:
        """Parameters that a quantized reference stores in few bits."""
        return sum(matrix.num_parameters for matrix in self.matrices)

    @property
    def num_linear(self) -> int:
        """Parameters of the linear layers, experts excepted."""
        return sum(matrix.size for matrix in self.matrices if not matrix.is_expert)


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """Return the shape of the causal language model that this configuration describes.

    Example:
        >>> from transformers import LlamaConfig
        >>> shape = model_shape(LlamaConfig(hidden_size=4096, num_hidden_layers=32))
        >>> f"{shape.num_parameters:,}"
        '6,738,415,616'
    """
    model = model_on_meta(config)
    text = config.get_text_config()
    layers = _decoder_layers(model, num_layers=int(text.num_hidden_layers))
    norms = _norms(layers[0])
    hidden = int(text.hidden_size)
    query_width, kv_width = attention_widths(text)
    return ModelShape(
        num_parameters=_num_parameters(model),
        matrices=tuple(_matrices(model)),
        num_layers=len(layers),
        largest_layer=max(map(_num_parameters, layers)),
        outside_layers=_num_parameters(model) - _num_parameters(nn.ModuleList(layers)),
        tables=tuple(_tables(model)),
        hidden_width=hidden,
        query_width=query_width,
        kv_width=kv_width,
        num_heads=int(text.num_attention_heads),
        **_mlp(text, layers[-1]),
        num_norms=len(set(norms) - _QUERY_NORMS),
        has_query_norm=bool(set(norms) & _QUERY_NORMS),
        has_float32_norms=any(type(norm).__name__.startswith("Gemma") for norm in norms.values()),
    )


def attention_widths(text: PreTrainedConfig) -> tuple[int, int]:
    """Return the width of all query heads, and of all key-value heads."""
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return heads * head_dim, int(getattr(text, "num_key_value_heads", None) or heads) * head_dim


_QUERY_NORMS = {"q_norm", "k_norm", "query_layernorm", "key_layernorm"}


def model_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a configuration, without its weights."""
    from transformers import AutoModelForCausalLM

    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return build(config)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _decoder_layers(model: nn.Module, *, num_layers: int) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [module for module in lists if len(module) == num_layers]
    return max(
        map(list, found), key=lambda layers: sum(map(_num_parameters, layers)), default=[model]
    )


def _norms(layer: nn.Module) -> dict[str, nn.Module]:
    """The norms of a layer by the last part of their names."""
    return {
        name.rpartition(".")[2]: module
        for name, module in layer.named_modules()
        if "norm" in type(module).__name__.lower()
    }


def _head(model: PreTrainedModel) -> nn.Module | None:
    get_head: Callable[[], nn.Module | None] = model.get_output_embeddings
    return get_head()


def _tables(model: PreTrainedModel) -> Iterator[Matrix]:
    get_embedding: Callable[[], nn.Module] = model.get_input_embeddings
    modules = (get_embedding(), _head(model))
    weights = [cast(Tensor, module.weight) for module in modules if module is not None]
    for weight in {id(weight): weight for weight in weights}.values():
        rows, columns = weight.shape
        yield Matrix(rows, columns)


def _matrices(model: PreTrainedModel) -> Iterator[Matrix]:
    """Linear layers but the output head, and the experts that a reference quantizes."""
    from transformers.pytorch_utils import Conv1D

    from trl_grpo_ext.reference.experts import expert_parameters

    head = _head(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            outputs, inputs = module.weight.shape
            yield Matrix(outputs, inputs)
    for _, parameter, _ in expert_parameters(model):
        experts, outputs, inputs = parameter.shape
        yield Matrix(outputs, inputs, experts, is_expert=True)


def _mlp(text: PreTrainedConfig, layer: nn.Module) -> dict[str, int]:
    """Inner widths of the MLP: of its dense part, and of the experts that a token goes through."""
    dense = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    if not any(p.ndim == 3 and p.shape[0] > 1 for p in layer.parameters()):
        return {"mlp_width": dense, "expert_width": 0, "num_experts_per_token": 0}
    width = int(getattr(text, "moe_intermediate_size", None) or dense)
    num_experts = int(text.num_experts_per_tok)
    shared = int(getattr(text, "shared_expert_intermediate_size", None) or 0)
    shared += width * int(getattr(text, "n_shared_experts", None) or 0)
    return {
        "mlp_width": shared,
        "expert_width": num_experts * width,
        "num_experts_per_token": num_experts,
    }
