"""benchmarks/gpu.py on a CPU: a small row of it, its list of rows, and its table."""

import torch
from hydra import compose, initialize_config_dir

from benchmarks import gpu


def test_a_small_row_is_measured(tmp_path):
    gpu.write_data(tmp_path, num_pictures=2, num_frames=3)
    [row] = [row for row in gpu.list_rows("cpu") if row.script is gpu.track]
    result = gpu.measure_row(row, "cpu", tmp_path)
    assert result["name"] == row.name and result["unit"] == "frames/s" and result["per_s"] > 0
    table = gpu.format_table([result, {"name": "other", "error": "out of memory"}], gpu.describe_machine("cpu"))
    assert (
        f"torch {torch.__version__}" in table and f"| {row.name} | " in table and "| other | out of memory |" in table
    )


def test_every_row_names_keys_that_its_script_has():
    rows = gpu.list_rows("cuda")
    assert len({row.name for row in rows}) == len(rows) == 4 + 7 + 2 * 7
    for row in rows + gpu.list_rows("cpu"):
        with initialize_config_dir(str(gpu.CONFIGS / gpu.TASKS[row.script]), version_base="1.3"):
            compose(row.script.__name__, [override.replace("FOLDER", "data") for override in row.overrides])
