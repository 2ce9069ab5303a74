"""Which pictures a dataset has, and which of them validate."""

import hashlib
from pathlib import Path


def dataset_folder(root: str | Path) -> Path:
    """Turn the setting `data.root` into a folder that is there.

    Raises:
        ValueError, FileNotFoundError: for what is no path, or no folder.
    """
    if not isinstance(root, (str, Path)):
        raise ValueError(f"data.root is {root!r}; must be a folder")
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"data.root {root} is not a folder (seen from {Path.cwd()}); set data.root to the dataset's folder, "
            "or data_root (environment variable DATA_ROOT) to the folder that holds your datasets"
        )
    return Path(root)


def first_few(lines: list[str], most: int | None) -> list[str]:
    """Keep the first lines of a list that may be long, and say how many more there are; None keeps all."""
    if most is None or len(lines) <= most:
        return lines
    return [*lines[:most], f"... and {len(lines) - most} more"]


def draw_validation(names: set[str], val_fraction: float, split_seed: int) -> set[str]:
    """Draw a fraction of names by a seeded order of them: a new name does not reshuffle the others.

    Raises:
        ValueError: for a fraction outside 0..1, and for a single name to divide.
    """
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"data.val_fraction is {val_fraction}; must be in 0..1")
    num_val = round(val_fraction * len(names))
    if 0 < val_fraction < 1 and names:
        if len(names) == 1:
            raise ValueError(
                f"data.val_fraction is {val_fraction}, but there is only {min(names)} to split; "
                "set data.val_fraction=0 to train on all, or 1 to only evaluate"
            )
        num_val = min(max(num_val, 1), len(names) - 1)
    in_seeded_order = sorted(names, key=lambda name: hashlib.sha256(f"{split_seed} {name}".encode()).digest())
    return set(in_seeded_order[:num_val])
