from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.serve.model import Classifier, load_classifier
from trl_grpo_ext.rewards.serve.settings import ServeSettings
from trl_grpo_ext.rewards.serve.wire import RefusedError

TEXTS = ["1+1=2", "a", "Is 7 + 5 = 12? Yes, it is.", "x" * 120, "<pad>", "7<pad><pad>", "no"]


Save = Callable[..., Path]


def load(folder: Path, **settings: Any) -> Classifier:
    return load_classifier(ServeSettings(model=str(folder), device="cpu", **settings))


def plain_logits(folder: Path, text: str) -> list[float]:
    """One text, no padding, no mask: transformers as its users call it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer([text], return_tensors="pt")).logits[0].tolist()


@pytest.mark.parametrize("folder", ["reward_dir", "three_labels_dir"])
def test_logits_in_a_batch_are_those_of_each_text_alone(
    folder: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)
    classifier = load(path)
    batched = classifier.logits(classifier.encode(TEXTS))
    for row, text in zip(batched, TEXTS, strict=True):
        assert row == pytest.approx(plain_logits(path, text), abs=1e-5)
    assert max(abs(batched[0][0] - row[0]) for row in batched[1:]) > 0.01  # texts do differ


def test_logits_of_a_text_do_not_depend_on_company_or_place(reward_dir: Path) -> None:
    classifier = load(reward_dir)
    draw = random.Random(0)
    [alone] = classifier.logits(classifier.encode(["The answer is 42."]))
    for _ in range(10):
        others = ["".join(draw.choices("abc 123", k=draw.randint(1, 200))) for _ in range(5)]
        place = draw.randint(0, 5)
        texts = [*others[:place], "The answer is 42.", *others[place:]]
        assert classifier.logits(classifier.encode(texts))[place] == pytest.approx(alone, abs=1e-5)


def test_logits_of_an_encoder_do_not_see_the_padding(reward_dir: Path, tmp_path: Path) -> None:
    """An encoder attends both ways, so padding on the right is seen unless it is masked."""
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=2,
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reward_dir / name, tmp_path)
    classifier = load(tmp_path)
    short, long = classifier.encode(["12", "y" * 100])
    [alone], both = classifier.logits([short]), classifier.logits([short, long])
    assert both[0] == pytest.approx(alone, abs=1e-5)


def test_encode_adds_no_second_bos(reward_dir: Path) -> None:
    classifier = load(reward_dir)
    bos, one = classifier.tokenizer.convert_tokens_to_ids(["<|im_start|>", "1"])

    class AddsBos:
        bos_token_id = bos

        def __call__(self, texts: list[str], **kwargs: Any) -> dict[str, Any]:
            encoded = classifier.tokenizer(texts, **kwargs)
            return {"input_ids": [[bos, *ids] for ids in encoded["input_ids"]]}

    adding = Classifier(classifier.model, AddsBos(), max_tokens=5)  # type: ignore[arg-type]
    assert adding.encode(["1", "<|im_start|>1"]) == [[bos, one], [bos, one]]
    assert adding.encode(["1<|im_start|><|im_start|>"]) == [[bos, one, bos, bos]]


def test_encode_refuses_what_the_model_cannot_read(reward_dir: Path) -> None:
    assert load(reward_dir).max_tokens == 256  # its positions; the tokenizer says 512
    classifier = load(reward_dir, max_tokens=4)
    assert len(classifier.encode(["1234"])[0]) == 4
    with pytest.raises(RefusedError, match=r"Text 1 has 5 tokens, and .* texts of 1 to 4"):
        classifier.encode(["1234", "12345"])
    with pytest.raises(RefusedError, match="Text 0 has 0 tokens"):
        classifier.encode([""])


def test_activation_is_sigmoid_softmax_or_none(three_labels_dir: Path) -> None:
    classifier = load(three_labels_dir)
    assert classifier.activated([[0.0], [math.log(3)]]) == [[0.5], [pytest.approx(0.75)]]
    [probs] = classifier.activated([[0.0, 0.0, math.log(2)]])
    assert probs == pytest.approx([0.25, 0.25, 0.5])
    config: Any = classifier.model.config
    config.problem_type = "multi_label_classification"
    assert classifier.activated([[0.0, math.log(3)]]) == [pytest.approx([0.5, 0.75])]
    config.problem_type = "regression"
    assert classifier.activated([[0.0, 3.0]]) == [[0.0, 3.0]]


def test_label_is_the_name_of_the_highest_logit(three_labels_dir: Path) -> None:
    assert load(three_labels_dir).best_label([0.1, -2.0, 0.3]) == "good"


def test_model_runs_in_float32_on_a_cpu_and_in_bfloat16_if_asked(reward_dir: Path) -> None:
    exact, rounded = load(reward_dir), load(reward_dir, dtype="bfloat16")
    assert (exact.model.dtype, rounded.model.dtype) == (torch.float32, torch.bfloat16)
    assert not exact.model.training
    [alone], [near] = exact.logits([[5, 6, 7]]), rounded.logits([[5, 6, 7]])
    assert near == pytest.approx(alone, rel=0.1, abs=0.1)


def test_language_model_is_refused_for_its_random_head(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a LlamaForCausalLM, a language model"):
        load(tiny_model_dir)


def test_model_without_padding_token_takes_the_tokenizers_or_the_named_one(
    tmp_path: Path, save_classifier: Save
) -> None:
    folder = save_classifier(tmp_path, num_labels=1, pad_token_id=None)
    found: Any = load(folder).model.config
    assert found.pad_token_id == 0  # <pad>
    named: Any = load(folder, pad_token="<unk>").model.config
    assert named.pad_token_id == 3
    with pytest.raises(ConfigurationError, match=r"`pad_token`='<nil>' stands for id None"):
        load(folder, pad_token="<nil>")
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "<pad>"', '"pad_token": null'))
    with pytest.raises(ConfigurationError, match=r"no padding token .* Set `pad_token`"):
        load(folder)


@pytest.mark.parametrize(
    ("found", "said"),
    [("-1", "no padding token that it can read"), ("5000", "could not be loaded")],
)
def test_padding_token_outside_the_embeddings_is_refused(
    found: str, said: str, tmp_path: Path, save_classifier: Save
) -> None:
    folder = save_classifier(tmp_path, num_labels=1)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"pad_token_id": 0', f'"pad_token_id": {found}'))
    with pytest.raises(ConfigurationError, match=said):
        load(folder)


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(
    tmp_path: Path, save_classifier: Save
) -> None:
    folder = save_classifier(tmp_path, num_labels=1, vocab_size=50)
    with pytest.raises(ConfigurationError, match="tokens and the model 50 embeddings"):
        load(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="could not be loaded as a sequence-class"):
        load(tmp_path)


def test_device_that_is_not_there_is_refused(reward_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="`device`='warp' cannot be used here"):
        load_classifier(ServeSettings(model=str(reward_dir), device="warp"))
