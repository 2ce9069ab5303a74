"""How much longer `python train_unet.py --help` takes than `python -c "import torch"`.

    python -m benchmarks.start_up

The target is at most one second more; the ratio here is that of the two times, and `extra_s` their difference.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import print_result, time_in_turn

REPOSITORY = Path(__file__).resolve().parent.parent
REPEATS = 7


def main() -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout

    assert "python train_unet.py" in run("train_unet.py", "--help")
    help_s, import_s = time_in_turn(lambda: run("train_unet.py", "--help"), lambda: run("-c", "import torch"), REPEATS)
    extra_s = round(help_s - import_s, 2)
    print_result("train_unet.py --help", 0.0, help_s, import_s, "", extra_s=extra_s, most_extra_s=1.0)


if __name__ == "__main__":
    main()
