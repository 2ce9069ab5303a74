"""A tiny run of each trainer gives the weights and metrics that it gave at 51375af, bit for bit.

recorded_runs.json holds them, recorded with that commit in one thread and MKL_CBWR=AUTO,STRICT (conftest.py), and
"recorded on" says on what; train_unet's were recorded anew since, when distances in its weight map lost their noise and
equal scores came to be told apart by val/loss, and train_sam2's when the rounds' gradients came to be added up
in the order of the rounds, last bits alone. Each recipe names all that a result depends on, so that a later default
leaves it alone.
"""

import json
from pathlib import Path

import pytest
import tiny
import tiny_segmentation
import tiny_tracking
import tiny_training
from recorded import check_numbers, collect_results, describe_machine, skip_on_another_machine

import train_sam2
import train_siamfc
import train_unet

RECORDED = json.loads((Path(__file__).resolve().parent / "recorded_runs.json").read_text())
COMMON = "device=cpu precision=fp32 num_workers=0 seed=3"
RECIPES = {
    "train_unet": """
        model=unet model.base_channels=4 model.depth=2 model.up=transposed
        data=folders data.root=DATA data.val_list=DATA/val.txt data.test_list=DATA/test.txt data.image_dir=images
        data.mask_dir=masks data.channels=3 data.num_classes=3 data.class_names=[background,disc,square]
        data.class_values=null data.ignore_values=[] data.nearest_value=false data.on_bad=stop
        data.image_size=[32,40] data.fit=resize data.scale=[0.7,1.1] data.hflip=true data.vflip=true data.rotation=15.0
        data.color_jitter=0.2 data.elastic_px=1.5
        loss.terms.cross_entropy=1.0 loss.terms.soft_iou=0.3 loss.terms.log_iou=0.2 loss.terms.dice=0.5
        loss.terms.tversky=0.4 loss.terms.focal=0.6
        loss.tversky_alpha=0.3 loss.focal_gamma=2.0 loss.class_weights=auto loss.border_weight=3.0 loss.border_sigma=5.0
        optim.name=adamw optim.lr=3e-3 optim.betas=[0.9,0.999] optim.weight_decay=0.01 optim.schedule=cosine
        optim.warmup_steps=1 optim.min_lr_factor=0.01
        train.steps=4 train.batch_size=2 train.accumulate=2 train.clip_norm=1.0 train.channels_last=true
        train.compile=false train.log_every=1 train.eval_every=2 train.save_every=1000 train.eval_images=null
        train.select_by=val/mean_iou train.early_stop_evals=null train.test_at_end=true train.picture_images=1
        tiles.size=[32,48] tiles.overlap=8
    """,
    "train_sam2": """
        model=sam2_nano model.checkpoint=none model.image_size=64
        data=label_map data.root=DATA data.val_list=DATA/val.txt data.image_dir=images data.label_dir=labels
        data.label_ending='' data.ignore_ids=[] data.on_bad=stop data.min_area_px=1 data.hflip=true
        data.color_jitter=0.2
        prompts.box_share=0.5 prompts.repeat_objects=false prompts.min_corrections=1 prompts.max_corrections=2
        prompts.truth_click_share=0.1 prompts.mask_only_rounds=1 prompts.detach=true
        loss.terms.focal=20.0 loss.terms.dice=1.0 loss.terms.cross_entropy=0.5 loss.foreground_balance=0.5
        loss.iou=1.0 loss.objectness=1.0 loss.click_similarity=0.5 loss.masks=best loss.all_masks=0
        loss.soft_truth=false loss.full_size_iou=false
        optim.lr=5e-4 optim.encoder_lr_factor=0.1 optim.betas=[0.9,0.999] optim.weight_decay=0.1 optim.warmup_steps=1
        optim.min_lr_factor=0.1
        cache=off fast_decoder=false
        train.steps=3 train.batch_size=2 train.accumulate=2 train.objects_per_image=3
        train.trainable=[prompt_encoder,mask_decoder,neck] train.loss_size=null train.clip_norm=0.1
        train.channels_last=false train.compile=false train.log_every=1 train.eval_every=2 train.save_every=1000
        train.eval_images=3 train.eval_clicks=[1,3] train.select_by=val/iou_1_click train.early_stop_evals=null
        train.picture_images=1
    """,
    "train_siamfc": """
        model=siamfc model.score_bias=false model.checkpoint=null
        data=got10k data.root=DATA data.train_folder=train data.val_folder=val data.leave_out=[]
        data.train_sequences=null data.val_sequences=null data.box_origin=1 data.on_bad=stop
        pairs.max_gap=100 pairs.stretch=0.05 pairs.exemplar_shift=4.0 pairs.instance_shift=4.0 pairs.grey=0.2
        pairs.color_jitter=0.2 pairs.blur=0.3 pairs.random_interpolation=true pairs.random_boxes=0.2 pairs.min_side=20
        pairs.max_side=500 pairs.min_share=0.01 pairs.max_share=0.5 pairs.max_aspect=4.0 pairs.min_cover=0.3
        optim.lr=0.01 optim.min_lr=1e-5 optim.hold_steps=1 optim.momentum=0.9 optim.weight_decay=5e-4
        optim.decay_all=true
        tracker.mode=fast tracker.context_amount=0.5 tracker.scale_num=3 tracker.scale_step=1.0375
        tracker.scale_penalty=0.9745 tracker.scale_lr=0.59 tracker.window_influence=0.176 tracker.response_up=16
        tracker.subpixel_peak=false tracker.max_scale_change=5.0 tracker.keep_center_inside=true tracker.lost_score=0.4
        train.steps=3 train.batch_size=2 train.accumulate=1 train.clip_norm=null train.r_pos=16.0
        train.channels_last=true train.compile=false train.log_every=1 train.eval_every=2 train.save_every=1000
        train.eval_sequences=null train.eval_frames=3 train.eval_pairs=2 train.select_by=val/ao
        train.early_stop_evals=null train.picture_pairs=1
    """,
}


@pytest.mark.parametrize(
    "script, write_dataset",
    [
        (train_unet, tiny_segmentation.write_dataset),
        (train_sam2, tiny_training.write_dataset),
        (train_siamfc, tiny_tracking.write_got10k),
    ],
    ids=lambda argument: getattr(argument, "__name__", ""),
)
def test_recorded_run(script, write_dataset, tmp_path, one_thread, monkeypatch):
    """Weights and numbers agree bit for bit where they were recorded, and in two runs elsewhere."""
    tiny.make_runs_quick(script, monkeypatch)  # what is left out changes no number
    root = write_dataset(tmp_path / "data")
    arguments = f"{COMMON} {RECIPES[script.__name__]}".replace("DATA", root.as_posix()).split()
    status, message = tiny.run_script(script, tmp_path / "run", *arguments)
    assert status == 0, message
    numbers, hashes = collect_results(tmp_path / "run")
    recorded = RECORDED[script.__name__]
    assert hashes.keys() == {"best.pt", "last.pt"}
    check_numbers(recorded["numbers"], numbers, script.__name__)
    if describe_machine() != RECORDED["recorded on"]:
        tiny.run_script(script, tmp_path / "other", *arguments)
        other_numbers, other_hashes = collect_results(tmp_path / "other")
        assert other_hashes == hashes and other_numbers == numbers
    skip_on_another_machine(RECORDED["recorded on"])
    assert hashes == recorded["hashes"] and numbers == recorded["numbers"]
