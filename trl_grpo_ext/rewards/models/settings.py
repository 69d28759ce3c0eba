"""Which model scores, where and how, checked before its weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

DType = Literal["auto", "float32", "bfloat16"]
Kind = Literal["sequence", "token"]
Pooling = Literal["transformers", "last"]
Quantization = Literal["nf4", "int8"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model that scores: how it is loaded, and what it reads.

    Args:
        model: Folder or Hub name of a classification model. No code of it runs.
        tokenizer: Folder or Hub name; the model's own if not given.
        device: ``auto`` (that of this process), or a name of torch such as ``cuda:1``.
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU that has it, else float32.
        quantization: ``nf4`` (4 bits) or ``int8`` of bitsandbytes; the head stays as it is.
        offload: Whether the weights stay in host memory and are on the device only while the model
            scores.
        max_tokens: Of prompt and answer together; what model and tokenizer take if not given.
        max_batch_tokens: Of one forward pass, padding included; a longer text goes alone.
        pad_token: For a model that names none, a special token of its vocabulary.
        pooling: Which token of a decoder the head of a sequence model sees: ``transformers``, the
            last one that is not the padding token, which is what TRL's ``RewardTrainer`` trains;
            or ``last``, whatever it is. They differ where a text ends in the padding token, as it
            does with an EOS token that is also the padding.
    """

    model: str
    tokenizer: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    quantization: Quantization | None = None
    offload: bool = False
    max_tokens: int | None = None
    max_batch_tokens: int = 16384
    pad_token: str | None = None
    pooling: Pooling = "transformers"


def model_problems(settings: ModelSettings) -> Iterator[str]:
    """Yield what keeps the model from being used; its configuration is read, no weight is.

    Example:
        >>> [problem] = model_problems(ModelSettings(model="/no/such/folder"))
        >>> problem.startswith("`model`='/no/such/folder' has no configuration that can be read")
        True
    """
    yield from _choice_problems(settings)
    for name in ("max_tokens", "max_batch_tokens"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            yield f"`{name}`={value} lets no text through. Set it above 0."
    try:
        read_config(settings.model)
    except (OSError, ValueError, KeyError) as error:
        yield _no_config(settings.model, error)


def kind_problems(config: Any, *, name: str, kind: Kind) -> Iterator[str]:
    """Yield why a model of this configuration has no head of the kind, as far as that says.

    Args:
        config: Of the model; one that names no architecture may be of any kind.
        name: Of the model.
        kind: That its head is to have.
    """
    other = "ForTokenClassification" if kind == "sequence" else "ForSequenceClassification"
    named = [one for one in config.architectures or () if one.endswith(other)]
    if named:
        yield (
            f"`model`={name!r} is a {named[0]}, whose head is not that of a {kind}-classification "
            "model, so its scores would be wrong. Use a model that scores each step as "
            "`process_model`, and one that scores replies as `outcome_model`."
        )
    elif any(one.endswith("ForCausalLM") for one in config.architectures or ()):
        yield (
            f"`model`={name!r} is a {config.architectures[0]}, a language model, which scores "
            "nothing. Name a model that was trained to classify or to reward, not the language "
            "model that it came from."
        )


def read_config(name: str) -> Any:
    """Return the configuration of a model; no code of its folder runs.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is of a model that transformers does not know.
    """
    from transformers import AutoConfig  # here, so that settings are read without torch

    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _choice_problems(settings: ModelSettings) -> Iterator[str]:
    known = {
        "dtype": get_args(DType),
        "quantization": (*get_args(Quantization), None),
        "pooling": get_args(Pooling),
    }
    for name, choices in known.items():
        if (value := getattr(settings, name)) not in choices:
            yield (
                f"`{name}`={value!r} is not known, so the model cannot be loaded. "
                f"Choose {', '.join(str(choice).replace('None', 'null') for choice in choices)}."
            )


def _no_config(name: str, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return (
        f"`model`={name!r} has no configuration that can be read ({type(error).__name__}: {first})"
        ", so nothing can be scored. Check the name; in a folder there must be the configuration, "
        "the weights and the tokenizer."
    )
