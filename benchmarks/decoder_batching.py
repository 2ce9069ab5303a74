"""Training the mask decoder on objects of several images in one decode, against one object after the other.

    python -m benchmarks.decoder_batching                                         # sam2.1_hiera_tiny at 1024 px
    python -m benchmarks.decoder_batching --model sam2_nano --image-size 256

Two images with 8 objects each, one click an object; random weights and embeddings, float32. Both ways go from finished
embeddings to the gradients of prompt encoder and mask decoder, with the same loss (cross-entropy of the first mask,
mean over objects). Plain: sam2's own prompt encoder and mask decoder, one object at a time, each with its backward, so
that it holds one object's activations. Ours: `utils.sam2.model.decode` with all objects in one call, one backward; once
as it is by default (sam2's own decoder) and once with fast_decoder=true. Before the clock starts, the gradients are
compared, with the ReLUs of the MLPs replaced by GELUs: a unit that rounding moves across the ReLU's kink turns the last
bit of a sum into a jump of its gradient. The difference with ReLUs is printed, too. Prints one JSON line each.
"""

import argparse

import torch

from benchmarks.measure import (
    CPU,
    print_result,
    read_config,
    time_in_turn,
)
from utils.fit import has_peak_memory, read_peak_memory, reset_peak_memory
from utils.run import seed_everything
from utils.sam2.model import Embeddings, build_sam2, decode, freeze_except

NUM_IMAGES, NUM_OBJECTS = 2, 8  # objects of each image
GRADIENT_LIMIT, TARGET = 1e-4, 1.3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="sam2.1_hiera_tiny", help="a file of configs/sam2/model")
    parser.add_argument("--image-size", type=int, default=1024, help="px")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each way, after one that warms up")
    arguments = parser.parse_args()
    seed_everything(0)
    side = arguments.image_size
    config = read_config("sam2/model", arguments.model) | {"checkpoint": "none", "image_size": side}
    model = build_sam2(**config, device=CPU).train()
    trainable = freeze_except(model, ["prompt_encoder", "mask_decoder"])

    channels, num_all = model.hidden_dim, NUM_IMAGES * NUM_OBJECTS
    embeddings = Embeddings(
        torch.randn(NUM_IMAGES, channels, side // 16, side // 16),
        [
            torch.randn(NUM_IMAGES, channels // 8, side // 4, side // 4),
            torch.randn(NUM_IMAGES, channels // 4, side // 8, side // 8),
        ],
    )
    image_index = torch.arange(NUM_IMAGES).repeat_interleave(NUM_OBJECTS)
    points, labels = side * torch.rand(num_all, 1, 2), torch.ones(num_all, 1, dtype=torch.int32)
    truth = (torch.rand(num_all, side // 4, side // 4) > 0.5).float()

    def compute_loss(low_res_masks: torch.Tensor, chosen: slice) -> torch.Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(low_res_masks[:, 0], truth[chosen])
        return loss * len(low_res_masks) / num_all

    def step_plain() -> None:
        model.zero_grad(set_to_none=True)
        for number in range(num_all):
            chosen = slice(number, number + 1)
            sparse_embeddings, dense_embeddings = model.sam_prompt_encoder(
                points=(points[chosen], labels[chosen]), boxes=None, masks=None
            )
            image = image_index[chosen]
            low_res_masks, _, _, _ = model.sam_mask_decoder(
                image_embeddings=embeddings.image_embeddings[image],
                image_pe=model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse_embeddings,
                dense_prompt_embeddings=dense_embeddings,
                multimask_output=True,
                repeat_image=False,
                high_res_features=[features[image] for features in embeddings.high_res_features],
            )
            compute_loss(low_res_masks, chosen).backward()

    def step_ours() -> None:
        model.zero_grad(set_to_none=True)
        low_res_masks, *_ = decode(model, embeddings, image_index, points, labels, None, multimask_output=True)
        compute_loss(low_res_masks, slice(None)).backward()

    for fast_decoder in (False, True):
        model.fast_decoder = fast_decoder
        with_relu = compare_gradients(trainable, step_ours, step_plain)
        mlps = [module for module in model.modules() if isinstance(getattr(module, "act", None), torch.nn.ReLU)]
        for mlp in mlps:
            mlp.act = torch.nn.GELU()
        apart = compare_gradients(trainable, step_ours, step_plain)
        for mlp in mlps:
            mlp.act = torch.nn.ReLU()
        assert apart <= GRADIENT_LIMIT, f"gradients differ by {apart} of their norm, more than {GRADIENT_LIMIT}"
        peaks = {"ours_peak_mib": measure_peak(step_ours), "plain_peak_mib": measure_peak(step_plain)}
        ours_s, plain_s = time_in_turn(step_ours, step_plain, arguments.repeats)
        print_result(
            f"decoder batching, {arguments.model}, {side} px{', fast_decoder' * fast_decoder}",
            TARGET,
            ours_s,
            plain_s,
            f"gradients, to {apart:.0e} of their norm; with ReLUs to {with_relu:.0e}",
            ours_objects_per_s=round(num_all / ours_s, 2),
            plain_objects_per_s=round(num_all / plain_s, 2),
            **peaks,
        )


def compare_gradients(trainable: dict, ours, plain) -> float:
    """Run both and compare the gradients they leave: the norm of the difference, as a share of the plain one's norm. A
    parameter that got none counts as zero.
    """
    gradients = []
    for step in (plain, ours):
        step()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainable.values()])
    norm = torch.stack([gradient.norm() for gradient in gradients[0]]).norm()
    apart = torch.stack([(ours - plain).norm() for ours, plain in zip(*gradients, strict=True)]).norm()
    return (apart / norm).item()


def measure_peak(step) -> int | None:
    """Run a step and read the peak of resident memory in it, MiB; None where the system does not tell."""
    reset_peak_memory(CPU)
    step()
    return read_peak_memory(CPU) // 2**20 if has_peak_memory(CPU) else None


if __name__ == "__main__":
    main()
