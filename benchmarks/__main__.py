"""Run the speed benchmarks, each in a process of its own, and print README's table of ratios.

python -m benchmarks                       # all; on an otherwise idle machine
python -m benchmarks tracker start_up      # some
python -m benchmarks "automatic_masks --model sam2.1_hiera_tiny"
"""

import json
import subprocess
import sys

BENCHMARKS = (
    "tracker", "pair_loading", "unet_training",
    "automatic_masks", "automatic_masks --model sam2.1_hiera_tiny", "start_up",
)  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    rows = ["| benchmark | ratio | target | ours, s | plain, s | found equal |", "|---|---|---|---|---|---|"]
    for name in names:
        done = subprocess.run(
            [sys.executable, "-m", *f"benchmarks.{name}".split()], stdout=subprocess.PIPE, text=True, check=True
        )
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                print(line, flush=True)
                one = json.loads(line)
                cells = (one["name"], one["ratio"], one["target"], one["ours_s"], one["plain_s"], one["checked_equal"])
                rows.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
