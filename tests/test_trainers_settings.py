"""What each trainer says of a setting that makes no sense, before its first step."""

import re
from pathlib import Path

import pytest
import tiny
import yaml
from hydra.errors import ConfigCompositionException
from tiny import changed_config

TRAINERS = ("train_sam2", "train_unet", "train_siamfc")
TYPOS = {  # on the command line, for Hydra
    "train_sam2": ["model.image_sise=64", "prompts.box_shre=0.5"],
    "train_unet": ["model.dpth=2"],
    "train_siamfc": ["pairs.max_gab=2", "tracker.scale_lrr=1"],
}
MISTAKES = {  # in a preset, whose keys Hydra does not mind
    "train_sam2": {
        "prompts: {box_shre: 0.5}": "unknown key prompts.box_shre",
        "loss: {focl: 1}": "unknown key loss.focl",
        "loss: {terms: {focl: 1}}": "unknown term loss.terms.focl",
        "loss: {terms: {dice: x}}": "loss.terms.dice is 'x'; must be a number",
        "model: {image_sise: 64}": "unknown key model.image_sise",
        "model: {image_size: big}": "model.image_size is 'big'; must be a whole number",
        "train: {trainable: mask_decoder}": "train.trainable is 'mask_decoder'; must be a list",
        "train: {eval_clicks: [1, two]}": "train.eval_clicks is [1, 'two']; must be a list, each a whole number",
        "train: {loss_size: half}": "train.loss_size is 'half'; must be a whole number or null",
        "prompts: {detach: 3}": "prompts.detach is 3; must be true or false",
        "optim: {betas: 0.9}": "optim.betas is 0.9; must be a list, each a number",
        "data: {hflip: maybe}": "data.hflip is 'maybe'; must be true or false",
        "fast_decoder: 3": "fast_decoder is 3; must be true or false or text",
    },
    "train_unet": {
        "loss: {focl: 1}": "unknown key loss.focl",
        "loss: {terms: {dise: 1}}": "unknown term loss.terms.dise",
        "loss: {terms: {dice: much}}": "loss.terms.dice is 'much'; must be a number",
        "loss: {terms: {cross_entropy: 0, dice: 0}}": "loss.terms is 0 in all its terms",
        "model: {dpth: 64}": "unknown key model.dpth",
        "model: {base_channels: wide}": "model.base_channels is 'wide'; must be a whole number",
        "tiles: {sise: 64}": "unknown key tiles.sise",
        "data: {image_size: large}": "data.image_size is 'large'; must be ",
    },
    "train_siamfc": {
        "pairs: {max_gab: 3}": "unknown key pairs.max_gab",
        "model: {score_bia: true}": "unknown key model.score_bia",
        "model: {score_bias: maybe}": "model.score_bias is 'maybe'; must be true or false",
        "tracker: {scale_lrr: 0.5}": "unknown key tracker.scale_lrr",
        "tracker: {scale_num: 3.5}": "tracker.scale_num is 3.5; must be a whole number",
        "pairs: {max_gap: 1.5}": "pairs.max_gap is 1.5; must be a whole number",
        "pairs: {random_interpolation: 1}": "pairs.random_interpolation is 1; must be true or false",
        "data: {box_origin: 2}": "data.box_origin is 2; must be 0 or 1",
    },
}
ALL_MISTAKES = {
    "train: {stepz: 3}": "unknown key train.stepz",
    "train: {steps: many}": "train.steps is 'many'; must be a whole number",
    "train: {batch_size: 2.5}": "train.batch_size is 2.5; must be a whole number",
    "optim: {learning_rate: 3}": "unknown key optim.learning_rate",
    "optim: {lr: fast}": "optim.lr is 'fast'; must be a number",
    "data: {rooot: x}": "unknown key data.rooot",
    "trian: {steps: 3}": "unknown key trian; must be among seed, ",
    "sed: 1": "unknown key sed; must be among seed, ",
    "seed: -1": "seed is -1; must be a whole number",
    "num_workers: few": "num_workers is few; must be",
    "check: maybe": "check is maybe; must be true, false or fit",
}
OUT_OF_RANGE = {
    "train_sam2": [
        "train.objects_per_image=0", "train.eval_clicks=[3]", "train.eval_clicks=[0,1]", "train.trainable=[]",
        "train.loss_size=0", "train.eval_images=0", "prompts.box_share=1.5", "prompts.max_corrections=-1",
        "prompts.mask_only_rounds=3", "loss.masks=worst", "loss.terms.dice=-1", "optim.betas=[0.9]",
        "optim.betas=[0.9,1.0]", "optim.lr=-1", "optim.encoder_lr_factor=-1", "optim.weight_decay=-1",
        "optim.warmup_steps=-1", "optim.min_lr_factor=2", "data.color_jitter=3", "data.min_area_px=-1",
        "prompts.truth_click_share=-1", "train.picture_images=-1",
    ],
    "train_unet": [
        "optim.lr=0", "train.eval_images=0", "data.fit=pad", "data.image_size=0", "data.image_size=[1,2,3]",
        "data.scale=[0,1]", "data.scale=[1.5,1]", "data.rotation=200", "data.color_jitter=2", "data.elastic_px=-1",
        "loss.class_weights=balanced", "loss.class_weights=[1,2]", "loss.terms.dice=-1", "loss.border_weight=-1",
        "loss.border_sigma=0", "optim.name=rmsprop", "optim.schedule=plateau", "optim.schedule=step",
        "optim.betas=[0.9]", "tiles.size=big", "tiles.size=64", "tiles.overlap=-1",
    ],
    "train_siamfc": [
        "train.eval_sequences=0", "train.eval_frames=1", "train.eval_pairs=-1", "train.picture_pairs=-1",
        "pairs.stretch=1.0", "pairs.stretch=-0.1", "pairs.max_gap=0", "pairs.exemplar_shift=-1",
        "pairs.instance_shift=-1", "pairs.max_aspect=0.5", "pairs.grey=1.5", "pairs.color_jitter=-0.1", "pairs.blur=2",
        "pairs.random_boxes=-1", "pairs.max_side=1", "pairs.max_share=0.0001", "optim.lr=0", "optim.min_lr=0",
        "optim.min_lr=0.1", "optim.hold_steps=0", "optim.momentum=1.0", "optim.weight_decay=-1", "tracker.scale_num=2",
    ],
}  # fmt: skip
ALL_OUT_OF_RANGE = [
    "train.steps=-1", "train.batch_size=0", "train.accumulate=0", "train.log_every=0", "train.eval_every=0",
    "train.save_every=0", "train.select_by=val/nothing", "train.clip_norm=0", "train.early_stop_evals=0",
]  # fmt: skip


def error_of(trainer, run_dir, change) -> str:
    """What a run with a changed config says, before its first step."""
    with pytest.raises(ValueError) as error:
        trainer.tiny.train_in(run_dir, changed_config(trainer.configure(), change))
    assert not (run_dir / "last.pt").exists()
    return str(error.value)


def test_typo_on_the_command_line_names_the_key(trainer):
    """The published SiamFC code takes any keyword and ignores it."""
    for override in ["train.stepz=3", "trian.steps=3", "data.rooot=x", *TYPOS[trainer.name]]:
        with pytest.raises(ConfigCompositionException) as error:
            trainer.configure(override)
        assert override.split("=")[0] in str(error.value)


@pytest.mark.parametrize(
    "trainer, content, message",
    [(name, *mistake) for name in TRAINERS for mistake in (ALL_MISTAKES | MISTAKES[name]).items()],
    indirect=["trainer"],
    scope="module",
)
def test_mistake_in_a_preset_names_the_key(trainer, content, message, tmp_path):
    assert error_of(trainer, tmp_path / "run", yaml.safe_load(content)).startswith(message)


@pytest.mark.parametrize(
    "trainer, override",
    [(name, override) for name in TRAINERS for override in ALL_OUT_OF_RANGE + OUT_OF_RANGE[name]],
    indirect=["trainer"],
    scope="module",
)
def test_value_that_makes_no_sense_is_named(trainer, override, tmp_path):
    key, value = override.split("=")
    shown = re.escape(value.strip("[]").replace(",", ", "))
    assert re.match(rf"{key} is \[?{shown}(\.0)?\]?; must be ", error_of(trainer, tmp_path / "run", override))


def test_mistake_is_one_line_for_the_user(trainer, tmp_path, capfd):
    arguments = [*trainer.tiny.tiny_overrides(Path("/nowhere")), "train.steps=abc"]
    status, message = tiny.run_script(trainer.script, tmp_path / "run", *arguments)
    assert (status, message) == (1, "error: train.steps is 'abc'; must be a whole number")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_key_that_is_missing_is_named(trainer, tmp_path):
    for section, key in (("train", "steps"), ("optim", "lr")):
        config = trainer.configure()
        del config[section][key]
        with pytest.raises(ValueError, match=f"the config lacks {section}.{key}"):
            trainer.tiny.train_in(tmp_path / section, config)
