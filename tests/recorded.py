"""Results that an earlier commit recorded: what a run folder holds as numbers and as hashes, and where hashes can be
compared.

Numbers agree on any machine up to rounding. Bits agree only where the same kernels compute: torch's version, the
processor's capability as torch names it, and, as neither settles it, the hash of a few products and convolutions.
"""

import csv
import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import without_timing


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """Hash names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def describe_machine() -> dict[str, str]:
    """What the bits of a result depend on, computed with as many threads as torch has now."""
    generator = torch.Generator().manual_seed(0)
    results = {}
    for rows in (1, 2, 9, 64):
        left = torch.rand(rows, 256, generator=generator)
        results[f"product {rows}"] = left @ torch.rand(256, 48, generator=generator)
    for channels, side, kernel in ((3, 41, 3), (16, 12, 3), (32, 9, 1), (3, 127, 11)):
        image = torch.rand(2, channels, side, side, generator=generator).requires_grad_()
        weight = torch.rand(8, channels, kernel, kernel, generator=generator).requires_grad_()
        response = F.conv2d(image, weight)
        response.square().mean().backward()
        results |= {f"{kernel} {side} {index}": t for index, t in enumerate((response, image.grad, weight.grad))}
    results["norm"] = F.layer_norm(left, (256,)).softmax(1).log().exp().sqrt()
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "opencv": cv2.__version__,
        "kernels": hash_tensors(results),
    }


def collect_results(run_dir: Path) -> tuple[dict, dict[str, str]]:
    """Read what a run wrote.

    Returns:
        numbers: nested metrics, boxes, qualities of masks, mean probabilities; without what depends on the load
        hashes: of the weights in best.pt and last.pt, and of files
    """
    numbers, hashes = {}, {}
    for path in sorted(run_dir.iterdir()):
        if path.suffix == ".pt":
            hashes[path.name] = hash_tensors(torch.load(path, weights_only=True)["model"])
        elif path.name == "metrics.csv":
            with path.open(newline="") as file:
                rows = without_timing(list(csv.DictReader(file)))
            numbers[path.name] = [{name: float(value) for name, value in row.items() if value} for row in rows]
        elif path.name == "run.json":  # all but the test split's stands in other files, or depends on the load
            metrics = json.loads(path.read_text())["metrics"]
            metrics = metrics.get("test") or metrics["last"]
            numbers[path.name] = {name: value for name, value in metrics.items() if name.startswith("test/")}
        elif path.suffix == ".npy":
            probabilities = np.load(path)  # float16 (C, H, W)
            numbers[path.name] = probabilities.astype(np.float64).mean((1, 2)).tolist()
            hashes[path.name] = hashlib.sha256(probabilities.tobytes()).hexdigest()[:20]
        elif path.name.endswith(("_classes.png", "_labels.png")):
            hashes[path.name] = hashlib.sha256(cv2.imread(str(path), -1).tobytes()).hexdigest()[:20]
        elif path.name == "boxes.txt":
            numbers[path.name] = np.loadtxt(path, delimiter=",").tolist()
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:20]
        elif path.suffix == ".json" and path.name not in ("run.json", "tracks.json"):
            annotations = json.loads(path.read_text())["annotations"]
            annotations = [
                {key: annotation[key] for key in annotation if key != "prompt"} for annotation in annotations
            ]
            names = ("area", "predicted_iou", "stability_score")
            numbers[path.name] = [[annotation[name] for name in names] for annotation in annotations]
            hashes[path.name] = hashlib.sha256(json.dumps(annotations).encode()).hexdigest()[:20]
    return numbers, hashes


def check_numbers(recorded, measured, place: str = "") -> None:
    """Hold that all recorded numbers were measured again, up to rounding."""
    if isinstance(recorded, dict):
        for name, value in recorded.items():
            check_numbers(value, measured[name], f"{place} {name}")
    elif isinstance(recorded, list):
        assert len(recorded) == len(measured), place
        for index, (value, other) in enumerate(zip(recorded, measured, strict=True)):
            check_numbers(value, other, f"{place} {index}")
    else:
        assert measured == pytest.approx(recorded, rel=1e-3, abs=1e-3), place


def skip_on_another_machine(recorded_on: dict[str, str]) -> None:
    """Skip a comparison of bits where other kernels compute, and say which."""
    machine = describe_machine()
    if machine != recorded_on:
        others = [f"{name} is {machine[name]}, not {value}" for name, value in recorded_on.items()]
        unlike = [other for other, name in zip(others, recorded_on, strict=True) if machine[name] != recorded_on[name]]
        pytest.skip(f"bits can be compared only where they were recorded: {'; '.join(unlike)}")
