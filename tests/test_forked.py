"""tests/forked.py: a forked process is what `python` starts, as far as a script, its caller and its folder can tell."""

import os
import subprocess
import sys

import pytest
from forked import child_environment, run_python

SCRIPT = """
import json, multiprocessing, os, sys
import beside
print(json.dumps([sys.argv[1:], os.getcwd(), sys.path[0], __name__, beside.VALUE, sys.stdin.read()]))
print(sorted(name for name, value in os.environ.items() if name not in ("_", "LC_CTYPE", "KMP_INIT_AT_FORK")))
process = multiprocessing.get_context("fork").Process(target=print, args=("from another process",))
process.start(), process.join()
print("said", file=sys.stderr)
end = sys.argv[1]
if end == "kill":
    sys.stdout.flush()
    os.kill(os.getpid(), 9)
sys.exit(int(end) if end.isdigit() else end)
"""


@pytest.mark.parametrize(("is_code", "end"), [(False, "3"), (True, "a message"), (False, "kill"), (True, "0")])
def test_a_forked_process_is_what_python_starts(is_code, end, tmp_path):
    for folder in ("scripts", "here"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "scripts" / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "scripts" / "beside.py").write_text("VALUE = 'é'")
    arguments = ["-c", SCRIPT] if is_code else [str(path)]
    arguments += [end, "a b", "é=1"]
    environment = child_environment(tmp_path / "scripts", SOME="thing")
    done = run_python(*arguments, cwd=tmp_path / "here", environment=environment)
    pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    real = subprocess.run([sys.executable, *arguments], cwd=tmp_path / "here", env=environment, **pipes)
    assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr)
    assert "said" in done.stderr and '"a b"' in done.stdout


def test_an_error_that_nobody_catches_ends_it_with_a_traceback_and_the_next_one_runs(tmp_path):
    done = run_python("-c", "import torch; torch.zeros(2) + torch.zeros(3)", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "RuntimeError" in done.stderr
    done = run_python("-c", "import sys; print([name for name in ('sam2', 'utils', 'tiny') if name in sys.modules])",
                      cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_a_process_that_hangs_is_ended(tmp_path):
    assert run_python("-c", "import time; time.sleep(60)", cwd=tmp_path, limit_s=1).returncode == -14


def test_paths_of_the_environment_stay_behind_those_that_are_given(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/one:/two")
    assert child_environment(tmp_path)["PYTHONPATH"] == os.pathsep.join([str(tmp_path), "/one", "/two"])
    monkeypatch.delenv("PYTHONPATH")
    assert child_environment(tmp_path)["PYTHONPATH"] == str(tmp_path)
