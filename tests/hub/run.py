"""A run of a few steps that pushes, as a program: ``run.py MODEL OUTPUT_DIR OPTIONS_AS_JSON``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset
from runs import settings, vowels

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer


def main() -> None:
    model, output_dir, given = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    ends = given.pop("ends", "push")
    prompts = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
    options = settings(output_dir.parent) | {"output_dir": str(output_dir), "max_steps": 2}
    options |= {"push_to_hub": True, "save_steps": 1, "save_strategy": "steps", **given}
    trainer = ExtGRPOTrainer(model, vowels, ExtGRPOConfig(**options), prompts)
    trainer.train()
    print("TRAINED", flush=True)
    if ends == "push":
        commit = trainer.push_to_hub(dataset_name="some/sums")
        print("PUSHED", None if commit is None else commit.oid, flush=True)
    elif ends == "killed":
        os._exit(9)


if __name__ == "__main__":
    main()
