from typing import Any, Literal

import pytest

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.protocols import PROTOCOLS, make_protocol
from trl_grpo_ext.rewards.api.protocols.options import fits


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (True, float, False),
        (float("nan"), float, False),
        (10**400, float, False),
        ("1", float, False),
        (True, bool, True),
        (1, bool, False),
        ("min", Literal["min", "max"], True),
        ("mean", Literal["min", "max"], False),
        ([], Literal["min", "max"], False),
        (None, str | None, True),
        ([0, 10], tuple[float, float], True),
        ([0, 10, 20], tuple[float, float], False),
        ("01", tuple[float, float], False),
        ({"a": [1, {"b": None}]}, Any, True),
        ({"a": {1}}, Any, False),
    ],
)
def test_fits_knows_the_types_of_options(value: object, hint: object, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_make_protocol_suggests_the_protocol_that_was_meant() -> None:
    with pytest.raises(ConfigurationError) as error:
        make_protocol("tei_predcit")
    assert str(error.value) == (
        "protocol 'tei_predcit' is not known (known: generic_json, nim, openai_chat, "
        "openai_ranking, openrlhf, sandbox_fusion, sglang, tei_predict, tei_rerank, vllm_classify, "
        "vllm_pooling, vllm_score), so the service could not be asked. Use 'tei_predict', or "
        "'generic_json' for a service of your own."
    )


def test_make_protocol_names_all_problems_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        make_protocol(
            "openai_chat",
            model="",
            rubrik="Be kind.",
            score_range=[10, 0],
            temperature="hot",
            max_tokens=0,
            labels={True: 1, False: 0},
        )
    assert error.value.problems == [
        "protocol 'openai_chat': `rubrik` is not an option, so it would have no effect. Use "
        "`rubric`, or remove it.",
        "protocol 'openai_chat': `labels` is {True: 1, False: 0} (dict), which is not a mapping "
        "(texts to a finite number) or null, so the service could not be asked. Correct it.",
        "protocol 'openai_chat': `temperature` is 'hot' (str), which is not a finite number or "
        "null, so the service could not be asked. Correct it.",
        "protocol 'openai_chat': `model` is not set, so the service could not be asked. Set it.",
        "protocol 'openai_chat': `max_tokens` is 0, so no verdict could be written. Raise it.",
        "protocol 'openai_chat': `score_range` is 10 to 0, so no score fits. Write the lower "
        "first.",
    ]


def test_make_protocol_reports_an_ill_typed_required_option_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        make_protocol("vllm_score", model=7, batch_size=0)
    assert error.value.problems == [
        "protocol 'vllm_score': `model` is 7 (int), which is not a text, so the service could not "
        "be asked. Correct it.",
        "protocol 'vllm_score': `batch_size` is 0, so nothing could be asked. Use 1 or more.",
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "openai_chat",
            {"temperature": -1.0},
            "`temperature` is -1.0, by which nothing can be drawn",
        ),
        ("openai_chat", {"extra": {"n": 2, "stop": "x"}}, "`extra` holds n, which would change"),
        ("openai_chat", {"labels": {"yes": 1}}, "`labels` has fewer than two words"),
        ("openai_chat", {"labels": {"a": 1, "b": 11}}, "`labels` gives b a score outside"),
        ("openai_chat", {"verdict": "pattern"}, "`verdict_pattern` and `verdict`='pattern' do not"),
        ("openai_chat", {"verdict_pattern": "(a)"}, "do not go together"),
        (
            "openai_chat",
            {"verdict": "pattern", "verdict_pattern": "(a"},
            "not a regular expression with one group",
        ),
        ("openai_ranking", {"votes": 0}, "`votes` is 0, so nothing is ranked"),
        ("vllm_classify", {"class_index": -1}, "`class_index` is -1, which is no class"),
        ("sglang", {"output_index": -1}, "`output_index` is -1, which is no place"),
        ("sandbox_fusion", {"run_timeout_s": 0}, "`run_timeout_s` is 0, so no program could run"),
        ("generic_json", {"score_path": "a..b"}, "`score_path` cannot be followed"),
        ("generic_json", {"score_path": "a[*]"}, "with `batch_size`=1, so it does not lead"),
        (
            "generic_json",
            {"template": {"a": ["x {completion}"]}, "batch_size": 2, "score_path": "[*]"},
            "`template` has a placeholder inside a longer text",
        ),
        ("generic_json", {"scale": "unit"}, "`score_range` is None, by which no score can be"),
    ],
)
def test_what_cannot_work_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_protocol(name, **options)
    assert any(message in problem for problem in error.value.problems)


def test_the_version_depends_on_the_options_but_not_on_the_batch_size() -> None:
    versions = {
        make_protocol("vllm_score", model="m", **options).version
        for options in ({}, {"batch_size": 7}, {"turn": "{content}"}, {"use_activation": False})
    }
    assert len(versions) == 3
    assert all(version.startswith("vllm_score-1-") for version in versions)


def test_only_judges_that_sample_are_sampled() -> None:
    assert not make_protocol("openai_chat", model="m").is_sampled
    assert make_protocol("openai_chat", model="m", temperature=0.7).is_sampled
    assert make_protocol("openai_chat", model="m", temperature=None).is_sampled
    template = {"template": {"a": "{completion}"}, "score_path": "s"}
    assert make_protocol("generic_json", **template, is_random=True).is_sampled


def test_the_names_in_the_table_are_those_of_the_classes() -> None:
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())
    assert len(PROTOCOLS) == 12
