"""Fixtures that all tests share."""

import os
from pathlib import Path

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # else a product's last bit depends on where in memory its input lies

import pytest  # noqa: E402
import torch  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: more threads would only wait
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real datasets, from the environment variable DATA_ROOT; without it the test is skipped."""
    value = os.environ.get("DATA_ROOT")
    if not value:
        pytest.skip("real data: set DATA_ROOT to the folder that holds the datasets (data/README.md)")
    root = Path(value).resolve()
    if not root.is_dir():
        pytest.fail(f"DATA_ROOT is {value}; no such folder")
    return root


@pytest.fixture(scope="module", params=["train_sam2", "train_unet", "train_siamfc"])
def trainer(request, tmp_path_factory):
    """Each of the three trainers (tests/trainers.py) on its tiny dataset."""
    from trainers import make_trainer  # which imports all three scripts

    return make_trainer(request.param, tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture
def one_thread():
    """Let torch compute in one thread: how many there are changes the last bits of a result."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(trylast=True)  # after pytest's own order, which goes by all parameters of a test
def pytest_collection_modifyitems(items):
    """Let the tests of a file that use the same trainer follow each other: its dataset and runs are made once."""
    files = {path: number for number, path in enumerate(dict.fromkeys(item.path for item in items))}
    trainers = ["train_sam2", "train_unet", "train_siamfc"]

    def place(item):
        name = item.callspec.params.get("trainer") if hasattr(item, "callspec") else None
        return files[item.path], trainers.index(name) if name in trainers else -1

    items.sort(key=place)
