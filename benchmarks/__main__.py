"""Run the speed benchmarks, each in a process of its own, and print benchmarks/README.md's table.

python -m benchmarks                       # all, about half an hour on 2 cores; on an otherwise idle machine
python -m benchmarks tracker pair_loading  # some
python -m benchmarks "automatic_masks --model sam2.1_hiera_tiny"
"""

import json
import subprocess
import sys

BENCHMARKS = (
    "embedding_cache --model sam2.1_hiera_small", "embedding_cache --model sam2.1_hiera_small --fast-decoder",
    "embedding_cache --model sam2.1_hiera_tiny", "embedding_cache --model sam2.1_hiera_tiny --fast-decoder",
    "embedding_cache --model sam2_nano --image-size 256 --steps 30",
    "embedding_cache --model sam2_nano --image-size 256 --steps 30 --fast-decoder",
    "decoder_batching", "decoder_batching --model sam2_nano --image-size 256 --repeats 20",
    "automatic_masks", "automatic_masks --fast-decoder",
    "automatic_masks --model sam2.1_hiera_tiny", "automatic_masks --model sam2.1_hiera_tiny --fast-decoder",
    "tracker", "pair_loading", "unet_training",
)  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or BENCHMARKS
    rows = ["| benchmark | ratio | aimed at | ours, s | plain, s | found equal |", "|---|---|---|---|---|---|"]
    for name in names:
        done = subprocess.run(
            [sys.executable, "-m", *f"benchmarks.{name}".split()], stdout=subprocess.PIPE, text=True, check=True
        )
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                print(line, flush=True)
                result = json.loads(line)
                times = f"{result['ours_s']:.3g} | {result['plain_s']:.3g}"
                cells = (result["name"], result["ratio"], result["target"] or "", times, result["checked_equal"])
                rows.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
