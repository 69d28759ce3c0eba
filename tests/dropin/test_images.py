"""A policy that reads images: TRL's paths for sampling and log-probabilities, our advantages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin.cases import LIKELIEST
from dropin.compare import Options, Run, assert_same_run, differ, ours, theirs
from PIL import Image
from tiny import build_tiny_tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from trl_grpo_ext.errors import ConfigurationError

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA that sees 16 x 16 pixels as 4 tokens."""
    folder = tmp_path_factory.mktemp("llava") / "tiny-llava"
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=image_token
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def seen(*colours: tuple[int, int, int]) -> Dataset:
    prompts = [[{"role": "user", "content": f"what is {index}"}] for index in range(12)]
    images = [Image.new("RGB", (16, 16), colours[i % len(colours)]) for i in range(12)]
    return Dataset.from_dict({"prompt": prompts, "image": images})


COLOURED = seen((250, 0, 0), (0, 250, 0), (20, 20, 250))


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2, "log_multimodal": False}])
def test_images_train_as_in_trl(llava_dir: Path, tmp_path: Path, changes: Options) -> None:
    options = LIKELIEST | {"train_dataset": COLOURED} | changes
    trainer = ours(llava_dir, tmp_path, **options)
    assert (trainer.group_sampler, trainer.reference_kind) == ("transformers", "resident")
    found = Run.of(trainer)
    expected = Run.of(theirs(llava_dir, tmp_path, **options))
    grey = Run.of(theirs(llava_dir, tmp_path, **options | {"train_dataset": seen((9, 9, 9))}))
    assert expected.moves
    assert differ(expected, grey)
    assert_same_run(found, expected)
    assert len(trainer._logs["images"]) == (0 if changes else 12)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"group_sampler": "shared_prefill"}, ConfigurationError),
        ({"use_transformers_continuous_batching": True}, ValueError),
    ],
)
def test_a_sampler_that_reads_no_images_is_refused(
    llava_dir: Path, tmp_path: Path, changes: Options, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"images|multimodal"):
        ours(llava_dir, tmp_path, train_dataset=COLOURED, **changes)


def test_plain_text_is_sampled_by_trl_too(llava_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = LIKELIEST | {"train_dataset": COLOURED.remove_columns("image")}
    found = Run.of(ours(llava_dir, tmp_path, **options))
    assert_same_run(found, Run.of(theirs(llava_dir, tmp_path, **options)))
