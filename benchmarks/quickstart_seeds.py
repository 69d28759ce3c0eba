"""Does the quickstart learn with every seed? Runs each and prints accuracy before and after.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2 3 4

Each run takes what `make quickstart` takes, and nothing else should run on the machine meanwhile.
Writes outputs/seeds/seeds.json; what was measured, and on what, stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = Path("outputs/seeds")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
KEYS = ("accuracy_before", "accuracy_after", "steps", "minutes")


def main() -> None:
    """Run the seeds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds = parser.parse_args().seeds
    summaries = {seed: run(seed) for seed in seeds}
    rows = [
        [seed, *(round(summary[key], 3) for key in KEYS)] for seed, summary in summaries.items()
    ]
    print("| seed | " + " | ".join(KEYS) + " |\n|" + "---|" * (len(KEYS) + 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    rises = [s["accuracy_after"] - s["accuracy_before"] for s in summaries.values()]
    print(f"smallest rise: {min(rises):.3f}")
    (OUTPUT / "seeds.json").write_text(json.dumps(summaries, indent=2))


def run(seed: int) -> dict[str, float]:
    """Run the quickstart with one seed and return its summary."""
    folder = OUTPUT / str(seed)
    recipe = [
        str(ROOT / "recipes/grpo.py"),
        "--config",
        str(ROOT / "recipes/configs/quickstart.yaml"),
    ]
    subprocess.run([*LAUNCH, *recipe, "--seed", str(seed), "--output_dir", str(folder)], check=True)
    summary: dict[str, float] = json.loads((folder / "summary.json").read_text())
    return summary


if __name__ == "__main__":
    main()
