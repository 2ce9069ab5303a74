"""How much longer `python <script>.py --help` takes than `python -c "import torch"`, for the slowest of the scripts.

    python -m benchmarks.start_up

Whole processes, in turn. The target is at most one second more: `extra_s`, the difference of the two times. `ratio` is
the time of the import over that of the script, and its target is the same second, put as a ratio. The help is printed
before anything is imported, so it tells nothing about how long a run takes to start: for that, a second line has
`train_unet.py --cfg job`, which imports everything and composes the config; it has no target.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import print_result, time_in_turn

REPOSITORY = Path(__file__).resolve().parent.parent
REPEATS = 5
MOST_EXTRA_S = 1.0


def run(*arguments: str) -> str:
    """Run Python with arguments, and return what it prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def main() -> None:
    measured = []
    for script in sorted(path.name for path in REPOSITORY.glob("*.py")):
        assert f"python {script}" in run(script, "--help")
        help_s, import_s = time_in_turn(
            lambda script=script: run(script, "--help"), lambda: run("-c", "import torch"), REPEATS
        )
        measured.append((help_s - import_s, help_s, import_s, script))
    extra_s, help_s, import_s, script = max(measured)
    config_s, import_s_then = time_in_turn(
        lambda: run("train_unet.py", "--cfg", "job"), lambda: run("-c", "import torch"), REPEATS
    )
    print_result(
        f"--help of {len(measured)} scripts against `import torch`, the slowest",
        round(import_s / (import_s + MOST_EXTRA_S), 2),
        help_s,
        import_s,
        "it prints the commands",
        script=script,
        extra_s=round(extra_s, 2),
        most_extra_s=MOST_EXTRA_S,
    )
    name, extra_s = "train_unet.py --cfg job against `import torch`", round(config_s - import_s_then, 2)
    print_result(name, None, config_s, import_s_then, "", extra_s=extra_s)


if __name__ == "__main__":
    main()
