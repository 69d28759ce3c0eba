from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import bitsandbytes.functional as quantization
import pytest
import torch
from rewards.models.tiny_orm import logits_at, save_orm, without_architecture
from rewards.models.tiny_prm import PlainLoop, activated, save_prm
from tiny import build_tiny_tokenizer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.integrations import deepspeed

from trl_grpo_ext.cpu_linear import OneDNNLinear
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.models.scoring_model import (
    Kind,
    ModelSettings,
    ScoringModel,
    model_problems,
)

PAD, END = 0, 2


@pytest.fixture(scope="session")
def orm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_orm(tmp_path_factory.mktemp("orm") / "one", num_labels=1)


@pytest.fixture(scope="session")
def wide_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
    return save_orm(tmp_path_factory.mktemp("orm") / "wide", num_labels=3, **sizes)


@pytest.fixture(scope="session")
def prm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_prm(tmp_path_factory.mktemp("prm") / "steps")


def load(folder: Path, *, kind: Kind = "sequence", **settings: Any) -> ScoringModel:
    return ScoringModel.load(ModelSettings(model=str(folder), device="cpu", **settings), kind=kind)


def refused(folder: Path, *, kind: Kind = "sequence", **settings: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(folder, kind=kind, **settings)
    [problem] = caught.value.problems
    return problem


def draw_texts(*lengths: int) -> list[list[int]]:
    """Token ids that are no special tokens, the same for the same lengths."""
    draw = random.Random(str(lengths))
    return [[draw.randint(4, 90) for _ in range(length)] for length in lengths]


# Logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 10_000])
def test_logits_are_those_of_each_text_alone_in_their_order(
    orm_dir: Path, max_batch_tokens: int
) -> None:
    texts = draw_texts(3, 80, 1, 17, 16, 15, 79, 2)
    found = load(orm_dir, max_batch_tokens=max_batch_tokens).logits(texts)
    for logits, text in zip(found, texts, strict=True):
        assert (logits.shape, logits.dtype, logits.device.type) == ((1,), torch.float32, "cpu")
        assert logits.tolist() == pytest.approx(logits_at(orm_dir, text), abs=1e-5)
    assert len({round(logits.item(), 3) for logits in found}) == len(texts)


def test_logits_of_tokens_are_those_of_each_text_alone(prm_dir: Path) -> None:
    texts, alone = draw_texts(30, 3, 31, 1), PlainLoop(prm_dir)
    for logits, text in zip(load(prm_dir, kind="token").logits(texts), texts, strict=True):
        assert logits.shape == (len(text), 2)
        probabilities = [activated(row) for row in logits.tolist()]
        for row, expected in zip(probabilities, alone.probabilities(text), strict=True):
            assert row == pytest.approx(expected, abs=1e-5)


def test_logits_are_the_same_whatever_the_policy_computes_in(orm_dir: Path) -> None:
    model, texts = load(orm_dir), draw_texts(9, 4)
    expected = model.logits(texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.logits(texts)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_logits_of_nothing_are_nothing(orm_dir: Path) -> None:
    assert load(orm_dir).logits([]) == []


@pytest.mark.parametrize("place", [0, 1])
def test_last_token_is_scored_though_it_is_the_padding_token(tmp_path: Path, place: int) -> None:
    """Padding is the EOS token: is the EOS that ends a text seen, in a batch too?"""
    folder = save_orm(tmp_path, pad_token_id=END)
    text, longer = draw_texts(9, 12)
    texts = [longer, longer]
    texts[place] = [*text, END]
    at_end, before = logits_at(folder, [*text, END]), logits_at(folder, [*text, END], -2)
    assert at_end != pytest.approx(before, abs=0.01)

    last = load(folder, pooling="last")
    assert last.logits(texts)[place].tolist() == pytest.approx(at_end, abs=1e-5)
    assert last.logits([[*text, END]])[0].tolist() == pytest.approx(at_end, abs=1e-5)
    assert load(folder).logits(texts)[place].tolist() == pytest.approx(before, abs=1e-5)


def test_default_pooling_is_that_of_transformers(tmp_path: Path) -> None:
    """So a model that TRL's RewardTrainer trained is scored where its head was trained."""
    folder = save_orm(tmp_path, pad_token_id=END)
    [text] = draw_texts(9)
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[*text, END]])).logits[0].tolist()
    assert load(folder).logits([[*text, END]])[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_last_token_of_an_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=128, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    load(tmp_path)
    assert "is a BertForSequenceClassification" in refused(tmp_path, pooling="last")


def test_scoring_is_repeatable_and_draws_no_random_number(orm_dir: Path) -> None:
    texts, before = draw_texts(5, 6, 7), torch.get_rng_state()
    states = random.getstate()
    model = load(orm_dir)
    first, second = model.logits(texts), model.logits(texts)
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == states
    assert not model.model.training


# Padding token ------------------------------------------------------------------------------------


def test_padding_token_comes_from_the_tokenizer_where_the_configuration_has_none(
    tmp_path: Path,
) -> None:
    folder = save_orm(tmp_path, pad_token_id=None)
    texts = draw_texts(4, 9)
    model = load(folder)
    assert model.model.config.pad_token_id == PAD
    for logits, text in zip(model.logits(texts), texts, strict=True):
        assert logits.tolist() == pytest.approx(logits_at(folder, text), abs=1e-5)


def test_padding_token_may_be_named(tmp_path: Path) -> None:
    folder = save_orm(tmp_path, pad_token_id=None)
    config: Any = load(folder, pad_token="<unk>").model.config
    assert config.pad_token_id == 3


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("7", "`pad_token`='7' is ordinary text .* scored without its end. Set `pad_token` to a"),
        ("user", "`pad_token`='user' is ordinary text"),  # added, and no special token
        ("<nil>", r"\(`pad_token`='<nil>' stands for id None\)"),
    ],
)
def test_wrong_padding_token_is_refused(orm_dir: Path, token: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load(orm_dir, pad_token=token)


# What is no model that scores ---------------------------------------------------------------------


def test_language_model_is_refused_and_no_random_number_drawn(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    assert "is a LlamaForCausalLM, a language model" in refused(tiny_model_dir)
    nameless = without_architecture(tiny_model_dir, tmp_path / "nameless")
    assert "such as 'score.weight'), so its scores would be random" in refused(nameless)
    assert torch.equal(torch.get_rng_state(), before)


def test_model_of_the_other_kind_is_refused(orm_dir: Path, prm_dir: Path) -> None:
    assert (
        f"`model`='{prm_dir}' is a LlamaForTokenClassification, whose head is not that of a "
        "sequence-classification model" in refused(prm_dir)
    )
    assert "is a LlamaForSequenceClassification" in refused(orm_dir, kind="token")


def test_encoder_of_the_other_kind_is_refused_though_its_head_has_the_same_names(
    tmp_path: Path,
) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertForSequenceClassification(BertConfig(vocab_size=128, **sizes))
    distilled = DistilBertForTokenClassification(
        DistilBertConfig(vocab_size=128, dim=8, hidden_dim=8, n_layers=1, n_heads=1)
    )
    for model, kind, other in ((bert, "sequence", "token"), (distilled, "token", "sequence")):
        folder = tmp_path / kind
        model.save_pretrained(folder)
        build_tiny_tokenizer().save_pretrained(folder)
        load(folder, kind=kind)
        said = f"is a {type(model).__name__}, whose head is not that of a {other}-classification"
        assert said in refused(folder, kind=other)


def test_model_that_names_no_architecture_is_judged_by_its_weights(tmp_path: Path) -> None:
    orm, prm = save_orm(tmp_path / "orm"), save_prm(tmp_path / "prm")
    for folder in (orm, prm):
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
    load(orm)
    load(prm, kind="token")
    assert "('score.bias') that a sequence-classification model does not read" in refused(prm)
    assert "such as 'score.bias'), so its scores would be random" in refused(orm, kind="token")


@pytest.mark.parametrize("damage", [b"", b"not weights", b"\x00" * 4096])
def test_damaged_weights_are_refused(tmp_path: Path, damage: bytes) -> None:
    folder = save_orm(tmp_path)
    (folder / "model.safetensors").write_bytes(damage)
    assert "could not be loaded as a sequence-classification model" in refused(folder)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_orm(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    assert "could not be loaded as a sequence-classification model" in refused(folder)


def test_no_code_of_the_folder_runs(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from pathlib import Path; Path(__file__ + '.ran').touch()")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    build_tiny_tokenizer().save_pretrained(tmp_path)
    assert "could not be loaded as a sequence-classification model" in refused(tmp_path)
    [problem] = model_problems(ModelSettings(model=str(tmp_path)))
    assert "has no configuration that can be read" in problem
    assert not list(tmp_path.glob("*.ran"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "float16"}, "`dtype`='float16' is not known"),
        ({"quantization": "int4"}, "`quantization`='int4' is not known"),
        ({"pooling": "first"}, "`pooling`='first' is not known"),
        ({"max_tokens": 0}, "`max_tokens`=0 lets no text through"),
        ({"max_batch_tokens": -1}, "`max_batch_tokens`=-1"),
        ({"model": "/nowhere"}, "`model`='/nowhere' has no configuration that can be read"),
    ],
)
def test_settings_are_checked_without_the_weights(
    orm_dir: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text((orm_dir / "config.json").read_text())
    assert list(model_problems(ModelSettings(model=str(tmp_path)))) == []
    [problem] = model_problems(ModelSettings(**{"model": str(tmp_path)} | settings))
    assert said in problem


def test_limit_is_the_smallest_of_settings_model_and_tokenizer(orm_dir: Path) -> None:
    assert load(orm_dir).max_tokens == 256  # positions; the tokenizer says 512
    assert load(orm_dir, max_tokens=100).max_tokens == 100
    assert load(orm_dir, max_tokens=1000).max_tokens == 256


def test_positions_of_a_roberta_begin_behind_that_of_its_padding(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=128,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=1,
        pad_token_id=1,
        max_position_embeddings=20,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    build_tiny_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.max_tokens == 18  # positions 2 to 19
    assert len(model.logits(draw_texts(18, 3))) == 2
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model.logits(draw_texts(19))


def test_tokenizer_may_be_another_folder(orm_dir: Path, tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.model_max_length = 99
    tokenizer.save_pretrained(tmp_path)
    assert load(orm_dir, tokenizer=str(tmp_path)).max_tokens == 99


# Where and in which numbers -----------------------------------------------------------------------


def dequantized(folder: Path) -> nn.Module:
    """The model with each weight but the head's as NF4 has it, in full precision."""
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):
            codes, state = quantization.quantize_4bit(layer.weight.data, quant_type="nf4")
            layer.weight.data = quantization.dequantize_4bit(codes, state)
    return model


def test_nf4_scores_are_those_of_the_rounded_weights_and_a_full_head(wide_dir: Path) -> None:
    texts, full = draw_texts(20, 9, 19), load(wide_dir)
    rounded = load(wide_dir, quantization="nf4")
    plain = dequantized(wide_dir)
    for found, exact, text in zip(rounded.logits(texts), full.logits(texts), texts, strict=True):
        with torch.no_grad():
            expected = plain(input_ids=torch.tensor([text])).logits[0]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert not torch.allclose(found, exact, atol=0.01)


def test_nf4_layers_of_any_width_compute_in_bfloat16_on_a_cpu(orm_dir: Path) -> None:
    """Layers of 32 inputs, which bitsandbytes cannot repack for CPUs with AVX-512 BF16."""
    texts = draw_texts(20, 9)
    exact = load(orm_dir, quantization="nf4").logits(texts)
    rounded = load(orm_dir, quantization="nf4", dtype="bfloat16").logits(texts)
    for found, expected in zip(rounded, exact, strict=True):
        assert found.tolist() == pytest.approx(expected.tolist(), rel=0.1, abs=0.1)


def test_int8_scores_are_near_the_full_ones(
    wide_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = draw_texts(20, 9, 19)
    rounded, full = load(wide_dir, quantization="int8").logits(texts), load(wide_dir).logits(texts)
    for found, exact in zip(rounded, full, strict=True):
        assert found.tolist() == pytest.approx(exact.tolist(), abs=0.02)
        assert not torch.equal(found, exact)
    assert not caplog.records  # bitsandbytes would tell of each product


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_quantized_model_keeps_its_head(
    quantization: Any, kind: Kind, wide_dir: Path, prm_dir: Path
) -> None:
    folder = wide_dir if kind == "sequence" else prm_dir
    exact, found = (
        dict(load(folder, kind=kind, quantization=chosen).model.named_modules())
        for chosen in (None, quantization)
    )
    assert type(found["score"]) is nn.Linear
    assert torch.equal(found["score"].weight, exact["score"].weight)
    up: Any = found["model.layers.1.mlp.up_proj"]
    assert up.weight.dtype in (torch.uint8, torch.int8)


def test_float32_on_a_cpu_is_multiplied_in_onednn(wide_dir: Path) -> None:
    texts, plain = draw_texts(20, 9), LlamaForSequenceClassification.from_pretrained(wide_dir)
    model = load(wide_dir)
    for found, text in zip(model.logits(texts), texts, strict=True):
        with torch.no_grad():
            expected = plain.eval()(input_ids=torch.tensor([text])).logits[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    linear = {type(layer) for layer in model.model.model.modules() if isinstance(layer, nn.Linear)}
    assert linear == {OneDNNLinear if torch._C._has_mkldnn else nn.Linear}


def test_weights_are_float32_on_a_cpu_and_bfloat16_if_asked(orm_dir: Path) -> None:
    texts = draw_texts(20, 9)
    exact, rounded = load(orm_dir), load(orm_dir, dtype="bfloat16")
    assert (exact.model.dtype, rounded.model.dtype) == (torch.float32, torch.bfloat16)
    for found, expected in zip(rounded.logits(texts), exact.logits(texts), strict=True):
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected.tolist(), rel=0.1, abs=0.1)


def test_device_that_is_not_there_is_refused(orm_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="`device`='warp' cannot be used here"):
        ScoringModel.load(ModelSettings(model=str(orm_dir), device="warp"), kind="sequence")


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_offload_on_a_cpu_changes_nothing(orm_dir: Path, quantization: Any) -> None:
    texts = draw_texts(3, 12)
    here = load(orm_dir, quantization=quantization).logits(texts)
    there = load(orm_dir, quantization=quantization, offload=True).logits(texts)
    assert torch.equal(torch.stack(here), torch.stack(there))


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_offloaded_model_leaves_the_gpu_after_each_call(wide_dir: Path, quantization: Any) -> None:
    texts = draw_texts(30, 12, 31)
    chosen: dict[str, Any] = {"dtype": "float32", "quantization": quantization}
    expected = torch.stack(load(wide_dir, **chosen).logits(texts))
    settings = ModelSettings(model=str(wide_dir), device="cuda", offload=True, **chosen)
    model = ScoringModel.load(settings, kind="sequence")
    for _ in range(3):
        found = torch.stack(model.logits(texts))
        held = torch.cuda.memory_allocated()  # with what cuBLAS keeps from its first call
        torch.testing.assert_close(found, expected, atol=0.05 if quantization else 1e-3, rtol=0)
        assert {tensor.device.type for tensor in model.model.parameters()} == {"cpu"}
    model.logits(texts)
    assert torch.cuda.memory_allocated() == held


class ZeroThree:
    """Stands for what DeepSpeed's configuration says under ZeRO-3."""

    def is_zero3(self) -> bool:
        return True


def test_model_is_loaded_whole_where_the_policy_is_split(orm_dir: Path) -> None:
    config, [text] = ZeroThree(), draw_texts(7)
    deepspeed.set_hf_deepspeed_config(config)
    try:
        [logits] = load(orm_dir).logits([text])
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert logits.tolist() == pytest.approx(logits_at(orm_dir, text), abs=1e-5)
