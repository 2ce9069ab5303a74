"""What each script offers: the files of configs/ that it can read, and no others."""

import importlib

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tiny import ROOT, config_dir, run_main

from utils import settings

OFFICIAL = [
    f"{family}_hiera_{size}" for family in ("sam2", "sam2.1") for size in ("base_plus", "large", "small", "tiny")
]
PICTURES = "coco davis dsb2018 glassware label_map labpics masks_per_file sa1b scenes".split()
SEQUENCES = "davis_sequences folder_sequences got10k imagenet_vid moving_shapes otb vot".split()
OPTIONS = {
    "train_sam2": {
        "data": PICTURES,
        "model": [*OFFICIAL, "sam2_nano"],
        "prompts": "mixed official point sam_paper".split(),
        "loss": "balanced sam tutorial".split(),
        "optim": ["adamw"],
        "experiment": "dsb2018 labpics pretrain_nano pretrain_nano_256 tutorial".split(),
    },
    "infer_sam2": {"model": [*OFFICIAL, "sam2_nano"]},
    "train_unet": {
        "data": "camvid folders isbi oxford_pet oxford_pet_two_classes pets_sample".split(),
        "model": "deeplabv3 fcn segnet segnet_dsc unet unet_paper unet_small vit vit_small".split(),
        "loss": "cross_entropy cross_entropy_dice dice focal log_iou soft_iou terms tversky".split(),
        "optim": "adamw sgd".split(),
        "experiment": "camvid_unet pets_fcn pets_segnet pets_segnet_dsc pets_unet pets_vit unet_isbi "
        "unet_isbi_paper".split(),
    },
    "train_siamfc": {
        "data": [*SEQUENCES, "pictures", "siamfc_bundled"],
        "model": ["siamfc"],
        "tracker": ["siamfc"],
        "optim": ["sgd"],
        "experiment": "siamfc_bundled siamfc_got10k siamfc_paper".split(),
    },
    "track": {"data": SEQUENCES, "model": ["siamfc"], "tracker": ["siamfc"], "optim": ["sgd"], "experiment": []},
}


@pytest.mark.parametrize("script", OPTIONS)
def test_options_of_each_script(script):
    """Those above, and none of another script's that is not its own; a new file needs no line here."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir(script)), version_base="1.3"):
        loader = GlobalHydra.instance().hydra.config_loader
        for group, names in OPTIONS[script].items():
            offered = set(loader.get_group_options(group, config_name=script, overrides=[]))
            foreign = {name for groups in OPTIONS.values() for name in groups.get(group, [])} - set(names)
            assert set(names) <= offered and not offered & foreign, group


@pytest.mark.parametrize(
    "script, argument",
    [
        ("train_unet", "data=coco"),
        ("train_sam2", "model=unet"),
        ("train_sam2", "loss=tversky"),
        ("track", "data=pictures"),
    ],
)
def test_option_of_another_script_ends_in_the_names_that_fit(script, argument, monkeypatch, capfd, tmp_path):
    status, output = run_main(importlib.import_module(script), monkeypatch, capfd, tmp_path / "run", argument)
    group, name = argument.split("=")
    assert status == 1 and f"Could not find '{group}/{name}'" in output and "Traceback" not in output
    listed = output[output.index(f"Available options in '{group}':") :].split()
    assert set(OPTIONS[script][group]) <= set(listed)


def test_file_in_its_old_place_is_named_with_its_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "utils" / "settings.py"))
    for folder in ("data", "loss", "unet/data"):
        (tmp_path / "configs" / folder).mkdir(parents=True)
    for file in ("data/cells.yaml", "data/both.yaml", "unet/data/both.yaml", "loss/mine.yaml"):
        (tmp_path / "configs" / file).write_text("root: x\n")
    settings.stop_at_moved_files("unet", ["data=both", "data.root=cells", "loss=other", f"input={'a' * 300}"])
    for argument, group, name in [("data=cells", "data", "cells"), ("loss=dice,mine", "loss", "mine")]:
        with pytest.raises(SystemExit) as stop:
            settings.stop_at_moved_files("unet", ["train.steps=1", argument])
        place = f"configs/{group}/{name}.yaml"
        assert stop.value.code == f"error: {group}={name}: {place} is read no more; move it to configs/unet/{group}/"


@pytest.mark.parametrize("script", OPTIONS)
def test_each_script_looks_for_moved_files_before_hydra_does(script):
    lines = (ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()
    assert lines[-2].endswith(f'read_command_line("{config_dir(script).name}")')
    assert lines[-1] == "    main()"
