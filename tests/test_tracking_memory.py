"""tracker=sam2: SAM 2's video memory a frame at a time, against sam2's own video predictor."""

import json

import cv2
import numpy as np
import pytest
import tiny_training
import torch
from options import read_option
from PIL import Image
from test_track import quick, run  # noqa: F401 (quick is a fixture)
from tiny_tracking import small_model

from utils.images import read_label_map
from utils.run import set_up_device
from utils.sam2 import model as models
from utils.sam2.model import build_sam2
from utils.tracking.frames import FrameSource
from utils.tracking.masks import FramePrompt, MemoryTracker, Segmenter, follow_objects, prompt_boxes
from utils.tracking.tracker import SiamFCTracker, TrackerSettings

SIDE, NUM_FRAMES = 128, 19


def make_model(seed):
    torch.manual_seed(seed)
    config = read_option("sam2", "model", "sam2.1_hiera_tiny") | {"checkpoint": "none", "image_size": SIDE}
    model = build_sam2(**config, device="cpu")
    with torch.no_grad():  # without training all memories weigh the same, and hardly anything
        for layer in model.memory_attention.layers:
            layer.cross_attn_image.out_proj.weight.mul_(20)
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].weight.mul_(100)
    return model


def make_official(weights):
    """sam2's video predictor with the weights of a model."""
    with models._sam2_without_hydra():
        from hydra import compose, initialize_config_module
        from hydra.utils import instantiate

        with initialize_config_module("sam2", version_base="1.2"):
            overrides = [
                "++model._target_=sam2.sam2_video_predictor.SAM2VideoPredictor",
                "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
                "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
                "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
                "++model.binarize_mask_from_pts_for_mem_enc=true",
                "++model.fill_hole_area=0",
                "++model.add_all_frames_to_correct_as_cond=true",
                f"++model.image_size={SIDE}",
            ]
            predictor = instantiate(compose("configs/sam2.1/sam2.1_hiera_t.yaml", overrides).model, _recursive_=True)
    predictor.load_state_dict(weights)
    return predictor.eval()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Frames of the model's own size as jpg files, and as they are read."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("video")
    ground = cv2.GaussianBlur(rng.uniform(0, 255, (SIDE, SIDE, 3)), (0, 0), 4)
    frames = []
    for index in range(NUM_FRAMES):
        frame = ground.copy()
        cv2.circle(frame, (30 + 3 * index, 50), 18, (230, 40, 40), -1)
        cv2.rectangle(frame, (70, 100 - 3 * index), (100, 120 - 3 * index), (40, 60, 220), -1)
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(folder / f"{index:05d}.jpg", quality=95)
        frames.append(np.array(Image.open(folder / f"{index:05d}.jpg").convert("RGB")))
    return folder, frames


def run_ours(model, frames, prompts, is_forgetful=False):
    """Track, and keep what each frame gave; a forgetful tracker has its prompted frames alone."""
    tracker = MemoryTracker(Segmenter(model, "fp32"), 2, len(frames))
    made = []
    for index, frame in enumerate(frames):
        masks, scores = tracker.step(frame, prompts.get(index, []))
        outputs = [
            bank["cond_frame_outputs"].get(index) or bank["non_cond_frame_outputs"].get(index) for bank in tracker.banks
        ]
        made.append((masks, scores, [None if each is None else dict(each) for each in outputs]))
        if is_forgetful:
            for bank in tracker.banks:
                bank["non_cond_frame_outputs"].clear()
    return made, tracker


PROMPTS = {  # by frame: an object from its box, another one later from points, then a correction of the first
    0: [FramePrompt(0, np.array([[12, 32], [48, 68]], np.float32), np.array([2, 3], np.int32))],
    4: [FramePrompt(1, np.array([[85, 98], [20, 20]], np.float32), np.array([1, 0], np.int32))],
    9: [FramePrompt(0, np.array([[57, 50]], np.float32), np.array([1], np.int32))],
}


def run_official(predictor, folder, prompts):
    """Prompts are given when tracking has come to their frame, as a person in front of a video does."""
    state = predictor.init_state(str(folder))
    shown = {}
    begin = 0
    for frame in sorted(prompts):
        if frame > begin or frame > 0:
            for index, _, masks in predictor.propagate_in_video(state, begin, frame - begin):
                shown[index] = masks
        for prompt in prompts[frame]:
            points, labels = prompt.point_coords, prompt.point_labels
            box = points[:2].ravel() if labels[0] == 2 else None
            more = {} if box is not None else {"points": points, "labels": labels}
            predictor.add_new_points_or_box(state, frame, prompt.place, box=box, **more)
        begin = frame
    for index, _, masks in predictor.propagate_in_video(state, begin):
        shown[index] = masks
    return state, shown


def differences(ours, theirs):
    """The largest difference of low-resolution logits, memories and pointers, each as a share of the largest."""
    found = {"pred_masks": 0.0, "maskmem_features": 0.0, "obj_ptr": 0.0, "seen apart": 0.0}
    for index, (_, _, outputs) in enumerate(ours):
        for place, output in enumerate(outputs):
            if output is None:
                continue
            official = theirs["output_dict_per_obj"][place]
            official = official["cond_frame_outputs"].get(index) or official["non_cond_frame_outputs"][index]
            for key in ("pred_masks", "maskmem_features", "obj_ptr"):
                own, other = output[key].float(), official[key].float()
                is_there = other != -1024
                assert torch.equal(own != -1024, is_there), (key, index, place)
                scale = other[is_there].abs().max() if is_there.any() else 1
                found[key] = max(
                    found[key], float((own - other)[is_there].abs().max() / scale) if is_there.any() else 0
                )
    return found


@pytest.fixture(scope="module")
def model():
    return make_model(seed=3)


def test_memory_is_that_of_the_official_predictor(video, model):
    folder, frames = video
    ours, tracker = run_ours(model, frames, PROMPTS)
    state, shown = run_official(make_official(model.state_dict()), folder, PROMPTS)
    found = differences(ours, state)
    assert max(found.values()) < 1e-4
    without, _ = run_ours(model, frames[:6], PROMPTS, is_forgetful=True)
    moved = differences(without, state)
    print(found, moved)
    assert (
        min(moved[key] for key in ("pred_masks", "maskmem_features", "obj_ptr")) > 1e-2
    )  # else the seed tells nothing
    scores = np.array([scores for _, scores, _ in ours])
    assert np.isnan(scores[:4, 1]).all() and np.isfinite(scores[4:]).all()
    is_seen = scores[np.isfinite(scores)] > 0.5
    assert 0.5 < is_seen.mean() < 1  # on most frames, not on all: both ways through the memory are taken
    for index, masks in shown.items():
        label_map, of_both = ours[index][0].label_map, (masks[:, 0] > 0).numpy()
        assert np.array_equal(label_map > 0, of_both.any(0))


@pytest.mark.gpu
def test_memory_on_a_gpu_is_that_of_the_official_predictor(video):
    device, _ = set_up_device("cuda", "fp32")
    model = make_model(seed=3).to(device)
    ours, _ = run_ours(model, video[1], PROMPTS)
    state, _ = run_official(make_official(model.state_dict()).to(device), video[0], PROMPTS)
    assert max(differences(ours, state).values()) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# track.py tracker=sam2

ENTRIES = [
    {"id": 1, "frame": 0, "box": [12, 32, 37, 37]},
    {"id": 2, "frame": 4, "points": [[85, 98, 1], [20, 20, 0]]},
    {"id": 1, "frame": 9, "points": [[57, 50, 1]]},
]


def test_track_takes_objects_of_any_frame(video, model, tmp_path, monkeypatch):
    """As the tracker alone, whose prompts these are; one frame is torn, which the other passes over, too."""
    monkeypatch.setattr("utils.tracking.masks.load_segmenter", lambda *arguments: Segmenter(model, "fp32"))
    folder = tmp_path / "frames"
    folder.mkdir()
    for path in sorted(video[0].iterdir())[:11]:
        (folder / path.name).write_bytes(path.read_bytes() if path.stem != "00006" else b"torn")
    (tmp_path / "objects.json").write_text(json.dumps(ENTRIES))
    arguments = [f"input={folder}", "tracker.mode=sam2", f"objects={tmp_path / 'objects.json'}"]
    failures = run(tmp_path / "run", *arguments, "write=[mot,davis]")
    assert (tmp_path / "run" / "overlay.mp4").exists()
    assert len(failures) == 1 and "00006" in failures[0]
    record = json.loads((tmp_path / "run" / "tracks.json").read_text())

    tracker = MemoryTracker(Segmenter(model, "fp32"), 2, 11)
    for index, frame in enumerate(video[1][:11]):
        if index == 6:
            tracker.next_index += 1
            assert all(each["lost"][6] and each["masks"][6] is None for each in record["objects"])
            continue
        masks, scores = tracker.step(frame, PROMPTS.get(index, []))
        assert np.array_equal(read_label_map(tmp_path / "run" / "masks" / f"{index:05d}.png"), masks.label_map)
        for place, each in enumerate(record["objects"]):
            assert each["masks"][index] == masks.segmentations[place]
            if not np.isnan(scores[place]):
                assert each["scores"][index] == pytest.approx(scores[place], abs=1e-6)
    assert record["objects"][1]["boxes_xywh"][3] == [None] * 4 and record["objects"][1]["lost"][:4] == [True] * 4
    assert record["objects"][1]["masks"][4] is not None


def test_a_fine_tuned_model_follows(video, tmp_path, monkeypatch):
    """train_sam2.py's best.pt of an official model, in track.py and in sam2's own predictor."""
    root = tiny_training.write_dataset(tmp_path / "data")
    overrides = ["model=sam2.1_hiera_tiny", "model.checkpoint=none", f"model.image_size={SIDE}", "train.steps=1"]
    overrides += ["train.batch_size=1", "train.objects_per_image=1", "prompts.max_corrections=1"]
    tiny_training.make_runs_quick(monkeypatch)
    tiny_training.script_evaluation(monkeypatch, [0.1, 0.2])
    trained = tmp_path / "trained"
    tiny_training.train_in(trained, tiny_training.compose_config(*tiny_training.tiny_overrides(root), *overrides))
    weights = torch.load(trained / "best.pt", weights_only=True)["model"]

    (tmp_path / "frames").mkdir()
    for path in sorted(video[0].iterdir())[:5]:
        (tmp_path / "frames" / path.name).write_bytes(path.read_bytes())
    arguments = [f"input={tmp_path / 'frames'}", "tracker.mode=sam2", "box=[12,32,37,37]", "overlay=false"]
    assert run(tmp_path / "run", *arguments, f"sam2.checkpoint={trained / 'best.pt'}") == []
    prompts = {0: [PROMPTS[0][0]._replace(point_coords=np.array([[12, 32], [48, 68]], np.float32))]}
    _, shown = run_official(make_official(weights), tmp_path / "frames", prompts)
    theirs = np.stack([(shown[index][0, 0] > 0).numpy() for index in range(5)])
    ours = np.stack([read_label_map(tmp_path / "run" / "masks" / f"{index:05d}.png") for index in range(5)])
    assert np.array_equal(ours, theirs) and theirs.any()


def test_a_prompt_of_a_frame_that_cannot_be_read_is_said(video, model, tmp_path, monkeypatch):
    """What corrects its object later starts none: "not there" alone gave a mask."""
    monkeypatch.setattr("utils.tracking.masks.load_segmenter", lambda *arguments: Segmenter(model, "fp32"))
    (tmp_path / "frames").mkdir()
    for path in sorted(video[0].iterdir())[:4]:
        (tmp_path / "frames" / path.name).write_bytes(path.read_bytes() if path.stem != "00001" else b"torn")
    entries = [
        ENTRIES[0],
        {"id": 2, "frame": 1, "box": [70, 90, 20, 20]},
        {"id": 2, "frame": 2, "points": [[20, 20, 0]]},
    ]
    (tmp_path / "o.json").write_text(json.dumps(entries))
    arguments = [f"input={tmp_path / 'frames'}", "tracker.mode=sam2", f"objects={tmp_path / 'o.json'}", "overlay=false"]
    failures = run(tmp_path / "run", *arguments)
    assert len(failures) == 2 and "00001.jpg cannot be read, and with it the prompt of object 2" in failures[1]
    record = json.loads((tmp_path / "run" / "tracks.json").read_text())
    assert record["objects"][1]["lost"] == [True] * 4 and record["objects"][1]["masks"] == [None] * 4
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]
    # an object that has not started is not missed
    assert metrics["last"]["num_lost"] == sum(record["objects"][0]["lost"]) < 4


@pytest.mark.parametrize("box", [[10, 10, 0, -5], [10, float("nan"), 5, 5], [-1e39, -1e39, 2e39, 2e39]])
def test_boxes_that_are_none_are_refused(box):
    with pytest.raises(ValueError, match="box 2 of 2 is .*; must be x, y, width, height px, finite"):
        prompt_boxes(np.array([[1, 2, 3, 4], box]))


@pytest.mark.parametrize(
    "entries, message",
    [
        ("[]", "must hold a list"),
        (
            [{"id": 1, "frame": 0, "box": [1, 2, 3, 4]}, {"id": 1, "frame": 0, "box": [1, 2, 3, 4]}],
            "entry 2: object 1 has",
        ),
        ([{"id": 1, "frame": 3, "box": [1, 2, 3, 4]}], "frame is 3, but .* has 3, from 0"),
        ([{"id": 2, "frame": 0, "box": [1, 2, 3, 4]}], "has no object 1; ids must be 1 to N"),
        ([{"id": 1, "frame": 0, "box": [1, 2, 0, 4]}], "box is .*; must be .* above 0"),
        ([{"id": 1, "frame": 0, "points": [[1, 2, 2]]}], "point is .* with label 1"),
        ([{"id": 1, "frame": 0, "points": [[1, 2, 0]]}], "object 1 starts with no box and no point of label 1"),
        ([{"id": 1, "frame": 0, "box": [10**400, 0, 10, 10]}], "box is"),
        ([{"id": 1, "frame": 0, "points": [[1e300, 2, 1]]}], "point is"),
        ([{"id": 10**18, "frame": 0, "box": [1, 2, 3, 4]}], "has no object 1; ids must be 1 to N"),
        ([{"id": 1, "frame": 0}], "has neither a box nor points"),
        ([{"id": 1.0, "frame": 0, "box": [1, 2, 3, 4]}], "id is 1.0; must be a whole number from 1"),
        ([{"id": 1, "frame": 0, "mask": "a.png"}], "and nothing else"),
        ([{"id": 1, "frame": 1, "points": [[500, 2, 1]]}], "00001.jpg: a prompt of object 1 lies outside the frame"),
        ([{"id": 1, "frame": 0, "box": [500, 2, 10, 10]}], "00000.jpg: a prompt of object 1 lies outside the frame"),
    ],
)
def test_bad_objects_are_one_line(video, model, tmp_path, monkeypatch, entries, message):
    monkeypatch.setattr("utils.tracking.masks.load_segmenter", lambda *arguments: Segmenter(model, "fp32"))
    (tmp_path / "frames").mkdir()
    for path in sorted(video[0].iterdir())[:3]:
        (tmp_path / "frames" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "o.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    arguments = [f"input={tmp_path / 'frames'}", "tracker.mode=sam2", f"objects={tmp_path / 'o.json'}", "overlay=false"]
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", *arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tracker.mode=sam2", "boxes=[[1,2,3,4]]"], "needs a model with memory modules, which the nano has not"),
        (["tracker.mode=sam2", "boxes=[[1,2,3,4]]", "checkpoint=best.pt"], "checkpoint is best.pt, which is SiamFC's"),
        (["objects=o.json"], "which tracker=sam2 alone takes"),
        (["tracker.mode=sam2", "objects=o.json", "boxes=[[1,2,3,4]]"], "objects= holds all prompts"),
        (["tracker.mode=sam2", "objects=o.json"], "objects is o.json; no such file"),
    ],
)
def test_what_does_not_go_together_is_one_line(video, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "run", f"input={video[0]}", *arguments, "overlay=false")


def test_training_refuses_the_other_tracker():
    with pytest.raises(ValueError, match="tracker.mode is sam2, which track.py alone has"):
        SiamFCTracker(small_model(), TrackerSettings(mode="sam2"))


def test_memory_of_the_tracker_is_bounded(model):
    """After 21 frames it holds what it held after 17, and memories of the last 6 frames beside the prompted one's."""
    tracker = MemoryTracker(Segmenter(model, "fp32"), 1, None)
    frame, sizes = np.zeros((32, 32, 3), np.uint8), []
    for index in range(21):
        tracker.step(
            frame, [FramePrompt(0, np.array([[5, 5]], np.float32), np.array([1], np.int32))] if index == 0 else []
        )
        (bank,) = tracker.banks
        kept = [*bank["cond_frame_outputs"].values(), *bank["non_cond_frame_outputs"].values()]
        tensors = [value for output in kept for value in output.values() if isinstance(value, torch.Tensor)]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    assert sizes[20] == sizes[16] > sizes[14]
    assert sum(output["maskmem_features"] is not None for output in bank["non_cond_frame_outputs"].values()) == 6


def test_an_object_after_the_end_of_a_stream_is_a_failure_beside_the_results(video, model):
    """Of a folder the number of frames is known before, and that is an error at once (above)."""
    frames = FrameSource(sorted(video[0].iterdir())[:2])
    frames.num_frames = None  # as a stream's
    followed = list(follow_objects(Segmenter(model, "fp32"), frames, {**PROMPTS, 7: PROMPTS[4]}, 2))
    assert len(followed) == 2 and followed[1][1].segmentations[0] is not None
    assert "objects has an entry for frame 4" in frames.problem and "ends with frame 1" in frames.problem
