"""Reading untrusted replies: strict JSON, and one finite score for each completion."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from trl_grpo_ext.rewards.api.wire import Reply, UnreadableReplyError, WireProtocol, WireRequest
from trl_grpo_ext.rewards.scores import Score

# What reading a reply of an unexpected shape may raise in a protocol.
_WRONG_SHAPE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)


def decode_body(body: bytes) -> Any:
    """Return the JSON value in a reply, read strictly.

    Raises:
        UnreadableReplyError: it is not JSON in UTF-8; or NaN, infinity, a number beyond every
            float, a name twice in one object, or nesting too deep is in it.

    Example:
        >>> decode_body(b'{"score": 7}')
        {'score': 7}
        >>> decode_body(b'{"score": 7, "score": 8}')
        Traceback (most recent call last):
        ...
        trl_grpo_ext.rewards.api.wire.UnreadableReplyError: the reply has a name twice in an object
    """
    try:
        return json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_distinct_names,
        )
    except UnreadableReplyError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, 4301 digits, too deep
        raise UnreadableReplyError(f"the reply is not JSON ({type(error).__name__})") from None


def read_reply(protocol: WireProtocol, request: WireRequest, body: bytes) -> Reply:
    """Return what the protocol reads off the reply, with its scores as floats.

    Scores beyond every float are infinite; see :func:`has_non_finite`.

    Raises:
        UnreadableReplyError: there is not one number or ``None`` for each completion asked about.
    """
    try:
        reply = protocol.parse(request, decode_body(body))
        scores, tokens = [_float(score) for score in reply.scores], _count(reply.tokens)
    except UnreadableReplyError:
        raise
    except _WRONG_SHAPE as error:
        raise UnreadableReplyError(
            f"the reply has an unexpected shape ({type(error).__name__})"
        ) from None
    if len(scores) != len(request.indices):
        raise UnreadableReplyError(
            f"the reply scores {len(scores)} completions, not {len(request.indices)}"
        )
    return Reply(scores, tokens=tokens)


def has_non_finite(scores: Sequence[Score]) -> bool:
    """Return whether NaN or an infinity is among the scores."""
    return any(score is not None and not math.isfinite(score) for score in scores)


def _float(score: object) -> Score:
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise UnreadableReplyError(f"the reply has a {type(score).__name__} for a score")
    try:
        return float(score)
    except OverflowError:
        return math.inf


def _count(tokens: object) -> int:
    """Return the tokens that the service claims, 0 if that is no count to believe."""
    is_count = isinstance(tokens, int) and not isinstance(tokens, bool)
    return tokens if is_count and 0 <= tokens < 10**9 else 0  # type: ignore[operator,return-value]  # mypy does not narrow through is_count


def _refuse_constant(name: str) -> NoReturn:
    raise UnreadableReplyError(f"the reply has {name}, which is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise UnreadableReplyError("the reply has a number beyond every float")
    return value


def _distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise UnreadableReplyError("the reply has a name twice in an object")
    return named
