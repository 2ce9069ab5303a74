"""Python processes that tests start: forked from one that has imported the libraries, which takes three seconds.

Nothing of this project is imported there, nothing is computed, and neither sam2 nor Hydra is started: a forked process
is at the point that `python` reaches by a script's imports of libraries, and ends as any other does.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKER = r"""
import gc, importlib, json, os, runpy, signal, sys
from pathlib import Path

paths = list(sys.path)
for name in sys.argv[1:]:
    importlib.import_module(name)
sys.path[:] = paths
gc.collect()
gc.freeze()  # else a forked process would copy all memory in looking for garbage, at its end at the latest
for line in sys.stdin:
    arguments, cwd, environment, out_dir, limit_s = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()

for number, place in enumerate((os.devnull, f"{out_dir}/stdout", f"{out_dir}/stderr")):
    opened = os.open(place, (os.O_WRONLY | os.O_CREAT) if number else os.O_RDONLY)
    os.dup2(opened, number)
    os.close(opened)
signal.alarm(limit_s)
os.environ.clear()
os.environ.update(environment)
os.chdir(cwd)
is_code = arguments[0] == "-c"
first = "" if is_code else str(Path(arguments[0]).parent)
sys.path[0] = first  # as python has it
sys.path[1:1] = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place not in ["", *sys.path]]
sys.argv = ["-c", *arguments[2:]] if is_code else arguments
if is_code:
    exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
else:
    runpy.run_path(arguments[0], run_name="__main__")
"""
LIBRARIES = [
    "cv2", "hydra", "matplotlib.figure", "numpy", "omegaconf", "PIL.Image", "pycocotools.mask", "torch",
    "torch.utils.data", "torch.utils.tensorboard", "torchvision.models", "torchvision.transforms.v2", "tqdm", "yaml",
]  # fmt: skip


def child_environment(*folders: Path, **variables: str) -> dict[str, str]:
    """The environment of a process that a test starts, which computes in one thread.

    Args:
        folders: where it looks for modules before it looks where this process does; the scripts' and the tests' if none
            are given. What PYTHONPATH has stays behind them: packages may be installed there.
        variables: others, as name=value.
    """
    places = [*map(str, folders or (ROOT, ROOT / "tests")), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"} | variables


@functools.cache
def _start_forker() -> subprocess.Popen:
    """Start the process that forks, once in this one; it ends where its input does, with this one."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-c", FORKER, *LIBRARIES], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes
    )


def run_python(
    *arguments, cwd: Path, environment: dict[str, str] | None = None, limit_s: int = 600
) -> subprocess.CompletedProcess:
    """Run `python <arguments>`, a script or -c and code with arguments of their own, in a forked process.

    Args:
        cwd: the folder where it runs.
        environment: its whole environment, as `child_environment` gives it; this process's if left out.
        limit_s: when it is ended, in seconds, by SIGALRM.
    Returns:
        as subprocess.run(..., capture_output=True, text=True) does.
    """
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as out_dir:
        forker, request = _start_forker(), [arguments, str(cwd), environment or dict(os.environ), out_dir, limit_s]
        print(json.dumps(request), file=forker.stdin, flush=True)
        status = forker.stdout.readline()
        assert status, "the process that forks has ended: see what it printed"
        outputs = [(Path(out_dir) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, int(status), *outputs)
