"""The project's own rules: who imports whom, nothing happens at import, requirements, and common.yaml."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import child_environment

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
UTILS = sorted((ROOT / "utils").rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
TASKS = {"sam2", "segmentation", "tracking"}  # folders of utils that import none of the others
PACKAGES = {"cv2": "opencv-python-headless", "hydra": "hydra-core", "omegaconf": "hydra-core", "PIL": "pillow"}
PACKAGES |= {"skimage": "scikit-image", "yaml": "pyyaml", "open_clip": "open_clip_torch"}
EXTRAS = {
    "onnx",
    "onnxruntime",
    "open_clip",
}  # of one mode or setting: imported inside functions, named where they are missing


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree) -> set[str]:
    """List what a file imports, at its top or inside functions, as dotted names: `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def file_imports(path) -> frozenset[str]:
    return frozenset(imports(parse(path)))


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def utils_imports(path) -> set[str]:
    """List the files of utils that a file imports, as utils.run or utils.sam2.model."""
    known = {module_name(each) for each in UTILS}
    prefixes = [[name.rsplit(".", drop)[0] for drop in (0, 1)] for name in file_imports(path)]
    return {prefix for pair in prefixes for prefix in pair if prefix in known}


def test_there_is_something_to_check():
    assert {"train_sam2", "infer_sam2"} <= {path.stem for path in SCRIPTS}
    assert {"utils.run", "utils.checkpoint", "utils.sam2.model"} <= {module_name(path) for path in UTILS}


@pytest.mark.parametrize("path", SCRIPTS + UTILS, ids=module_name)
def test_imports_go_from_scripts_to_utils_to_libraries(path):
    tops = {name.split(".")[0] for name in file_imports(path)}
    assert not tops & ({script.stem for script in SCRIPTS} | {"tests", "benchmarks"})


def test_what_tasks_share_imports_no_task_and_no_task_another():
    for path in UTILS:
        room = path.parent.name
        used = {name.split(".")[1] for name in utils_imports(path)} & TASKS
        joined = {"sam2"} if path == ROOT / "utils" / "tracking" / "masks.py" else set()  # joins a tracker and SAM 2
        assert used <= {room} | joined, path


def test_no_import_cycles_in_utils():
    waiting = {module_name(path): utils_imports(path) for path in UTILS}
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & set(waiting)}
        assert free, f"these import each other: {sorted(waiting)}"
        for name in free:
            del waiting[name]


def test_sam2_and_instantiate_stand_in_one_file_and_not_at_its_top():
    for path in SCRIPTS + UTILS:
        tree = parse(path)
        imported = {name for name in imports(tree) if name.split(".")[0] == "sam2" or name == "hydra.utils.instantiate"}
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        imported |= attributes & {"instantiate"}
        if path != ROOT / "utils" / "sam2" / "model.py":
            assert not imported, path
            continue
        top = ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], [])
        assert not {name for name in imports(top) if name.split(".")[0] in ("sam2", "hydra")}, path


def test_no_bare_except_no_warnings_no_defaults_for_config_keys():
    for path in SCRIPTS + UTILS:
        for node in ast.walk(parse(path)):
            place = f"{path.name}:{getattr(node, 'lineno', 0)}"
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{place}: bare except"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("warnings", "warn"), f"{place}: raise, or print, instead"
                is_config = node.value.id in ("cfg", "config", "settings")
                assert not (is_config and node.attr == "get"), f"{place}: a missing key must be an error"


IMPORT_ALL = """
import contextlib, io, json, sys
import torch
state = torch.get_rng_state()
for name in sys.argv[1:]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        __import__(name)
    assert printed.getvalue() == "", f"importing {name} prints {printed.getvalue()!r}"
    assert "sam2" not in sys.modules, f"importing {name} imports sam2"
    if "hydra" in sys.modules:
        from hydra.core.global_hydra import GlobalHydra
        assert not GlobalHydra.instance().is_initialized(), f"importing {name} starts Hydra"
    assert not torch.cuda.is_initialized(), f"importing {name} touches the GPU"
    assert torch.equal(torch.get_rng_state(), state), f"importing {name} draws random numbers"
    for slow in ("matplotlib.pyplot", "tensorboard"):
        assert slow not in sys.modules, f"importing {name} imports {slow}"
"""


def test_importing_any_file_prints_writes_and_starts_nothing(tmp_path):
    def files():
        folders = [ROOT / name for name in ("configs", "data", "checkpoints", "outputs", "utils")]
        paths = list(ROOT.glob("*")) + [path for folder in folders for path in folder.rglob("*")]
        return {path for path in paths if "cache" not in path.as_posix()}

    before = files()
    names = [module_name(path) for path in UTILS] + [path.stem for path in SCRIPTS]
    environment = child_environment(ROOT, PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr
    assert list(tmp_path.iterdir()) == []
    assert files() == before


# ---------------------------------------------------------------------------------------------------------------------
# requirements


def required(name: str) -> set[str]:
    """List the packages of a requirements file."""
    packages = set()
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            packages |= required(line[3:])
        elif line:
            packages.add(re.match(r"[A-Za-z0-9_.-]+", line).group().lower())
    return packages


def third_party(paths) -> set[str]:
    own = {path.stem for path in SCRIPTS + TESTS} | {"utils", "tests", "benchmarks"}
    names = {name for path in paths for name in file_imports(path)}
    tops = {"tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0] for name in names}
    return {PACKAGES.get(top, top) for top in tops - own - set(sys.stdlib_module_names)}


def test_requirements_list_what_is_used_and_nothing_else():
    assert third_party(SCRIPTS + UTILS) - {PACKAGES.get(name, name) for name in EXTRAS} == required("requirements.txt")
    for path in SCRIPTS + UTILS:
        top = ast.Module([node for node in parse(path).body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        assert not {name.split(".")[0] for name in imports(top)} & EXTRAS, path
    assert third_party(TESTS) <= required("requirements-test.txt")
    plugins = {"ruff", "pytest-xdist", "hydra-submitit-launcher"}
    assert required("requirements-test.txt") <= third_party(SCRIPTS + UTILS + TESTS) | plugins


# ---------------------------------------------------------------------------------------------------------------------
# configs/shared/common.yaml, in a script of five lines

SCRIPT = """
import os
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path="configs/small", config_name="small")
def main(cfg):
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    print(os.getcwd(), hydra.core.hydra_config.HydraConfig.get().runtime.output_dir, config, sep="|")

main()
"""


@pytest.fixture
def run_small(tmp_path):
    """Make a script that uses common.yaml, and return the function that runs it: arguments -> (process, its rows)."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "small").mkdir()
    (tmp_path / "configs" / "small" / "small.yaml").write_text(
        "{defaults: [common, _self_], hydra: {searchpath: [pkg://configs.shared]}}"
    )
    (tmp_path / "small.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "DATA_ROOT"}

    def run_small(*arguments, **variables):
        command = [sys.executable, "small.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True)
        rows = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
        return done, rows

    return run_small


def test_common_config_and_run_folder(tmp_path, run_small):
    done, [[working_dir, run_dir, config]] = run_small()
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(config) == {
        "seed": 0, "device": "auto", "precision": "auto", "num_workers": "auto", "resume": None, "data_root": "data",
    }  # fmt: skip
    assert Path(working_dir) == tmp_path  # paths of the user stay relative to where the user stands
    folder = Path(run_dir).relative_to(tmp_path)
    assert re.fullmatch(r"outputs/small/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", folder.as_posix())
    assert (tmp_path / folder / ".hydra" / "config.yaml").exists() and (tmp_path / folder / "small.log").exists()

    done, [[_, other_dir, config]] = run_small("seed=3", DATA_ROOT="/somewhere/else")
    assert ast.literal_eval(config)["data_root"] == "/somewhere/else" and ast.literal_eval(config)["seed"] == 3
    assert other_dir != run_dir
    done, [[_, _, config]] = run_small("data_root=mine", DATA_ROOT="/somewhere/else")
    assert ast.literal_eval(config)["data_root"] == "mine"


def test_a_typo_on_the_command_line_fails_and_names_the_key(run_small):
    done, rows = run_small("sead=1")
    assert done.returncode != 0 and "sead" in done.stderr and not rows


def test_multirun_gives_each_job_its_own_folder(tmp_path, run_small):
    done, rows = run_small("--multirun", "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert [Path(run_dir).name for _, run_dir, _ in rows] == ["0", "1"]
    sweep = Path(rows[0][1]).parent
    assert sweep.parent == tmp_path / "outputs" / "small" and (sweep / "multirun.yaml").exists()
    assert json.dumps([ast.literal_eval(config)["seed"] for _, _, config in rows]) == "[0, 1]"


# ---------------------------------------------------------------------------------------------------------------------
# --help


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_docstring_and_waits_for_no_import(path, flag, tmp_path):
    command = [sys.executable, "-X", "importtime", str(path), "seed=1", flag]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ast.get_docstring(parse(path), clean=False) + "\n"
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "site" in imported  # importtime has listed something
    assert not imported & {"torch", "torchvision", "numpy", "cv2", "hydra", "omegaconf", "tqdm", "utils"}
    assert list(tmp_path.iterdir()) == []
