"""The files of configs/ as a script gets them, for tests."""

import copy
import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def read_option(task: str, group: str, name: str) -> dict:
    """Read configs/<task>/<group>/<name>.yaml with the files it inherits from; ${...} stays as it is."""
    return copy.deepcopy(_read_option(task, group, name))


@functools.cache
def _read_option(task: str, group: str, name: str) -> dict:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS / task), version_base="1.3"):
        return OmegaConf.to_container(compose(f"{group}/{name}")[group])
