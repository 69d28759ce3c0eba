"""The protocols by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.protocols.generic_json import GenericJSON
from trl_grpo_ext.rewards.api.protocols.nim import NIM
from trl_grpo_ext.rewards.api.protocols.openai_chat import OpenAIChat
from trl_grpo_ext.rewards.api.protocols.openai_ranking import OpenAIRanking
from trl_grpo_ext.rewards.api.protocols.openrlhf import OpenRLHF
from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol, type_problems
from trl_grpo_ext.rewards.api.protocols.sandbox_fusion import SandboxFusion
from trl_grpo_ext.rewards.api.protocols.sglang import SGLang
from trl_grpo_ext.rewards.api.protocols.tei_predict import TEIPredict
from trl_grpo_ext.rewards.api.protocols.tei_rerank import TEIRerank
from trl_grpo_ext.rewards.api.protocols.vllm_classify import VLLMClassify
from trl_grpo_ext.rewards.api.protocols.vllm_pooling import VLLMPooling
from trl_grpo_ext.rewards.api.protocols.vllm_score import VLLMScore
from trl_grpo_ext.rewards.api.wire import WireProtocol

# To add a protocol: write its file, add its class here.
PROTOCOLS: Mapping[str, type[ServiceProtocol]] = {
    protocol.name: protocol
    for protocol in (
        GenericJSON,
        NIM,
        OpenAIChat,
        OpenAIRanking,
        OpenRLHF,
        SandboxFusion,
        SGLang,
        TEIPredict,
        TEIRerank,
        VLLMClassify,
        VLLMPooling,
        VLLMScore,
    )
}


def make_protocol(name: str, **options: Any) -> WireProtocol:
    """Return the protocol of this name with these options.

    Args:
        name: A name in :data:`PROTOCOLS`.
        options: Fields of its class.

    Raises:
        ConfigurationError: there is no such protocol, or its options cannot work; all problems at
            once.

    Example:
        >>> make_protocol("tei_rerank", raw_scores=False).is_sampled
        False
        >>> make_protocol("tei_rerank", raw_score=False)
        Traceback (most recent call last):
        trl_grpo_ext.errors.ConfigurationError: protocol 'tei_rerank': `raw_score` is not an \
option, so it would have no effect. Use `raw_scores`, or remove it.
    """
    if name not in PROTOCOLS:
        raise ConfigurationError([_unknown_protocol(name)])
    protocol = PROTOCOLS[name]
    known = {option.name for option in fields(protocol)}
    problems = [_unknown_option(name, one, known) for one in options if one not in known]
    chosen = {option: value for option, value in options.items() if option in known}
    ill_typed = {o for o, value in chosen.items() if type_problems(protocol, {o: value})}
    problems += type_problems(protocol, {option: chosen[option] for option in sorted(ill_typed)})
    try:
        made = protocol(**{o: value for o, value in chosen.items() if o not in ill_typed})
    except ConfigurationError as error:
        # An option of a wrong type has its default here, which is no problem of its own.
        problems += [
            p for p in error.problems if not any(f"`{o}` is not set" in p for o in ill_typed)
        ]
        raise ConfigurationError(problems) from None
    if problems:
        raise ConfigurationError(problems)
    return made


def _unknown_protocol(name: str) -> str:
    close = get_close_matches(name, PROTOCOLS, n=1)
    return (
        f"protocol '{name}' is not known (known: {', '.join(sorted(PROTOCOLS))}), so the service "
        f"could not be asked. Use {repr(close[0]) if close else 'one of them'}, or 'generic_json' "
        "for a service of your own."
    )


def _unknown_option(name: str, option: str, known: set[str]) -> str:
    close = get_close_matches(option, known, n=1)
    advice = f"Use `{close[0]}`" if close else f"Use one of {', '.join(sorted(known))}"
    return (
        f"protocol '{name}': `{option}` is not an option, so it would have no effect. {advice}, or "
        "remove it."
    )
