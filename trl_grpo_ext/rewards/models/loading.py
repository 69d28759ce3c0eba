"""Loading a classification model: where to, in which numbers, and whether its scores mean anything.

Nothing of the model's folder runs, and torch's random numbers stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.models.settings import Kind, ModelSettings, kind_problems, read_config
from trl_grpo_ext.zero3 import without_zero3

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# No such model, an unknown kind, weights that are damaged or do not fit, no package, no memory.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    AssertionError,
    RuntimeError,
    SafetensorError,
)
AUTO_MODELS: dict[Kind, Any] = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is that of this process of a run, or the first GPU.

    Raises:
        ConfigurationError: It is not there.
    """
    try:
        return torch.empty(0, device=_own_device() if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch without CUDA
        problem = f"`device`={name!r} cannot be used here ({error}). Choose 'auto' or 'cpu'."
        raise ConfigurationError([problem]) from error


def load_model(
    settings: ModelSettings, *, kind: Kind, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in evaluation mode, and its tokenizer.

    Args:
        settings: See :class:`ModelSettings`.
        kind: Whether it has logits for each text, or for each token.
        device: Where it is to score; with ``offload`` the weights are in host memory.

    Raises:
        ConfigurationError: See :meth:`ScoringModel.load`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.tokenizer or settings.model, trust_remote_code=False
        )
        model, loaded = _from_pretrained(settings, kind=kind, device=device)
    except LOADING_ERRORS as error:
        raise ConfigurationError([_not_loaded(settings.model, kind, error)]) from error
    problems = [
        *_head_problems(model, loaded, name=settings.model, kind=kind),
        *_vocabulary_problems(model, tokenizer),
        *_pooling_problems(model, settings, kind=kind),
    ]
    if problems:
        raise ConfigurationError(problems)
    _set_pad_token(model, tokenizer, settings=settings)
    model.config.use_cache = False
    return model.eval(), tokenizer


def _own_device() -> torch.device | str:
    if PartialState._shared_state:  # as the trainer, or `accelerate launch`, has set it up
        return cast(torch.device, PartialState().device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _from_pretrained(
    settings: ModelSettings, *, kind: Kind, device: torch.device
) -> tuple[PreTrainedModel, dict[str, Any]]:
    home = torch.device("cpu") if settings.offload else device
    dtype = _dtype(settings, device)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if settings.quantization is not None:
        options["quantization_config"] = _bitsandbytes(settings, kind=kind, dtype=dtype)
        options["device_map"] = {"": home}
    generators = [home] if home.type == "cuda" else []  # a head that is missing would be drawn
    with without_zero3(), torch.random.fork_rng(generators):
        model, loaded = AUTO_MODELS[kind].from_pretrained(
            settings.model, output_loading_info=True, **options
        )
    if settings.quantization == "nf4":
        _keep_cpu_layout(model, dtype=dtype)
    return model if model.device == home else model.to(home), loaded


def _dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def _bitsandbytes(settings: ModelSettings, *, kind: Kind, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration that quantizes all linear layers but the head."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_says_something)
    return BitsAndBytesConfig(
        load_in_8bit=settings.quantization == "int8",
        load_in_4bit=settings.quantization == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_head_modules(settings.model, kind=kind),
    )


def _keep_cpu_layout(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Let layers compute on a CPU as they are stored, where bitsandbytes would repack them wrongly.

    On a CPU with AVX-512 BF16, bitsandbytes 0.50 repacks a 4-bit layer at its first use
    (``_convert_weight_packed_for_cpu``): it then computes in bfloat16 whatever the dtype, and fails
    if the widths are no multiples of 64 and 32. Remove when it looks at dtype and widths itself.
    """
    from bitsandbytes.nn.modules import Linear4bit  # where it cannot be, no model is quantized

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            fits = layer.in_features % 64 == 0 and layer.out_features % 32 == 0
            if dtype == torch.float32 or not fits:
                layer.support_avx512bf16_for_cpu = False


def _says_something(record: logging.LogRecord) -> bool:
    """Return False for what bitsandbytes 0.50 tells of every 8-bit product: that it rounds."""
    return "inputs will be cast from" not in record.getMessage()


def _head_modules(name: str, *, kind: Kind) -> list[str]:
    """Return the names of the modules beside the backbone."""
    with torch.device("meta"):
        model = AUTO_MODELS[kind].from_config(read_config(name), trust_remote_code=False)
    return [child for child, _ in model.named_children() if child != model.base_model_prefix]


def _num_embeddings(model: PreTrainedModel) -> int:
    return int(cast(Any, model.get_input_embeddings()).weight.shape[0])


def _set_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, settings: ModelSettings
) -> None:
    """Let the configuration name the padding token, which tells the model where a text ends."""
    config = model.config.get_text_config()
    if settings.pad_token is not None:
        config.pad_token_id = tokenizer.get_vocab().get(settings.pad_token)
    elif config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    found = config.pad_token_id
    if found is None or not 0 <= found < _num_embeddings(model):
        raise ConfigurationError([_no_pad_token(settings, found)])
    if settings.pad_token is not None and found not in _special_ids(tokenizer):
        raise ConfigurationError([_text_as_pad_token(settings)])


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _head_problems(
    model: PreTrainedModel, loaded: dict[str, Any], *, name: str, kind: Kind
) -> Iterator[str]:
    if others := list(kind_problems(model.config, name=name, kind=kind)):
        yield from others
    elif missing := sorted(loaded["missing_keys"]):
        yield (
            f"`model`={name!r} lacks {len(missing)} weights of a classification model (such as "
            f"{missing[0]!r}), so its scores would be random. Name a model that was trained to "
            "classify or to reward, not the language model that it came from."
        )
    elif left := sorted(key for key in loaded["unexpected_keys"] if key.startswith("score.")):
        yield (
            f"`model`={name!r} has weights in its head ({left[0]!r}) that a {kind}-classification "
            "model does not read, so its scores would be wrong. Use a model that scores each step "
            "as `process_model`, and one that scores replies as `outcome_model`."
        )


def _vocabulary_problems(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    num_embeddings = _num_embeddings(model)
    if len(tokenizer) > num_embeddings:
        yield (
            f"The tokenizer has {len(tokenizer)} tokens and the model {num_embeddings} embeddings, "
            "so some texts could not be read. Use the tokenizer that the model was trained with."
        )


def _pooling_problems(
    model: PreTrainedModel, settings: ModelSettings, *, kind: Kind
) -> Iterator[str]:
    if kind == "sequence" and settings.pooling == "last" and not hasattr(model, "score"):
        yield (
            f"`model`={settings.model!r} is a {type(model).__name__}, which does not score a last "
            "token, so `pooling`='last' means nothing. Leave `pooling` at 'transformers'."
        )


def _no_pad_token(settings: ModelSettings, found: int | None) -> str:
    where = f"`pad_token`={settings.pad_token!r} stands for" if settings.pad_token else "It has"
    return (
        f"`model`={settings.model!r} has no padding token that it can read ({where} id {found}), "
        "so several texts could not share a forward pass. Set `pad_token` to a token of its "
        "vocabulary; the one that it was trained with is right."
    )


def _text_as_pad_token(settings: ModelSettings) -> str:
    return (
        f"`pad_token`={settings.pad_token!r} is ordinary text to the tokenizer of "
        f"`model`={settings.model!r}, so a reply that ends with it would be scored without its "
        "end. Set `pad_token` to a special token; the one that it was trained with is right."
    )


def _not_loaded(name: str, kind: Kind, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return (
        f"`model`={name!r} could not be loaded as a {kind}-classification model "
        f"({type(error).__name__}: {first}), so nothing can be scored. Check the name; in a "
        "folder there must be the configuration, the weights and the tokenizer."
    )
