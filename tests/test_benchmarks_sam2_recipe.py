"""The benchmark of training recipes: its command lines compose, its halves are halves, its numbers are right."""

import numpy as np
import pytest
from tiny import compose_config
from tiny_training import write_data_root

from benchmarks import sam2_recipe


def test_recipes_and_datasets_compose():
    rows = sam2_recipe.DATASETS
    for dataset, recipe in [("glassware", each) for each in sam2_recipe.RECIPES] + [
        (each, "published") for each in rows
    ]:
        config = compose_config("train_sam2", *sam2_recipe.list_overrides(dataset, recipe, 3))
        assert config["seed"] == 3 and config["train"]["eval_images"] == 1
        is_published = recipe.startswith("published")
        assert (config["train"]["batch_size"] == 1) == is_published
        assert not is_published or config["train"]["steps"] == rows[dataset].published_steps


def test_halves_that_choose_and_report_share_no_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(write_data_root(tmp_path)))
    config = compose_config("train_sam2", "data=dsb2018", "data.val_fraction=0.75")
    halves = [[item.name for item in sam2_recipe.choose_items(config, True, part)] for part in ("choose", "report")]
    every = [item.name for item in sam2_recipe.choose_items(config, False, "all")]
    assert sorted(halves[0] + halves[1]) == every and len(every) == 3 and halves[0] and halves[1]


def test_ranking_is_described_as_by_a_loop():
    rng = np.random.default_rng(0)
    true, predicted = rng.random((50, 3)), rng.random((50, 3))
    described = sam2_recipe.describe_ranking({"true": true, "predicted": predicted})
    chosen = [max(range(3), key=lambda m: row[m]) for row in predicted.tolist()]
    best = [max(range(3), key=lambda m: row[m]) for row in true.tolist()]
    shares = [chosen.count(m) / 50 for m in range(3)] + [best.count(m) / 50 for m in range(3)]
    regret = sum(true[o, b] - true[o, c] for o, (b, c) in enumerate(zip(best, chosen, strict=True))) / 50
    error = sum(abs(predicted[o, c] - true[o, c]) for o, c in enumerate(chosen)) / 50
    expected = [*shares, *true.mean(0), *predicted.mean(0), regret, error]
    assert described == pytest.approx(expected)


def test_interval_of_paired_differences():
    mean, half = sam2_recipe.interval(np.array([0.01, 0.03, 0.02, 0.04, 0.0]))
    assert mean == pytest.approx(0.02) and half == pytest.approx(0.01963, abs=1e-5)  # 2.776 * 0.015811 / sqrt(5)
