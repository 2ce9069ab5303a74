"""Classes of masks: a small head on the decoder's mask tokens, and what it learns from.

A mask's class is read from the token that the decoder made the mask from. The head lies beside SAM 2's weights in
best.pt ("class_head", "classes"), which other programs read as before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from utils.checkpoint import load_checkpoint
from utils.instances.readers import Instances, class_name
from utils.listing import first_few
from utils.settings import FINITE, Rule, above, at_least

NONE = "none"  # the class of what is no object of a named class: the head's first answer
UNKNOWN = -1  # the target of an object whose class is not known: it teaches the masks alone


def _is_choice(setting: object) -> bool:
    return setting == "auto" or (
        isinstance(setting, list) and len(setting) > 0 and all(isinstance(name, str) and name for name in setting)
    )


Choice = Annotated[list | str | None, Rule(_is_choice, "auto or a list of names (numbers in quotes)")]


def _is_weights(setting: object) -> bool:
    return setting == "auto" or (
        isinstance(setting, dict)
        and all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in setting.values())
    )


@dataclass(frozen=True)
class ClassSettings:
    """How classes are learned (`class_head:`)."""

    lr: Annotated[float, above(0), FINITE] = 1e-3  # highest rate of the head, which starts from random weights
    # {name: weight of its objects}, auto: rare classes more, by the root of their number; None: all count the same
    class_weights: Annotated[dict | str | None, Rule(_is_weights, "auto or {name: weight}")] = None
    background_clicks: Annotated[int, at_least(0)] = 4  # of a picture, on what is no object: they teach "none"


class ClassHead(nn.Module):
    """Tell the class of masks from their tokens: logits of "none" and of each name."""

    def __init__(self, names: Sequence[str], num_channels: int, seed: int = 0):
        super().__init__()
        self.names = list(names)
        with torch.random.fork_rng(devices=[]):  # no other draw of a run changes
            self.layers = nn.Sequential(
                nn.Linear(num_channels, num_channels), nn.ReLU(), nn.Linear(num_channels, 1 + len(names))
            )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                bound = self.layers[0].in_features ** -0.5  # as nn.Linear draws them
                parameter.uniform_(-bound, bound, generator=generator)
        self.register_buffer("class_weights", torch.ones(1 + len(names)))  # of "none" and each name, in the loss

    def forward(self, mask_tokens: torch.Tensor) -> torch.Tensor:
        """Compute logits, float32 (..., 1 + names), of mask tokens (..., C); under autocast, too, in fp32."""
        with torch.autocast(mask_tokens.device.type, enabled=False):
            return self.layers(mask_tokens.float())

    def loss(self, mask_tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute the weighted cross-entropy of each mask: (O, M, C), int64 (O,) -> (O, M); 0 for UNKNOWN."""
        logits = self(mask_tokens)  # (O, M, 1 + names)
        targets = targets[:, None].expand(logits.shape[:2])
        return F.cross_entropy(
            logits.movedim(-1, 1), targets, weight=self.class_weights, ignore_index=UNKNOWN, reduction="none"
        )

    def classify(self, mask_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give masks the likeliest of the names: tokens (K, C) -> its place in `names` (K,), and its probability (K,).

        The probability is that of the name among all answers, so that it is low where "none" is likely.
        """
        probs, numbers = self(mask_tokens).softmax(-1)[..., 1:].max(-1)
        return numbers, probs

    def describe(self, class_numbers: torch.Tensor, class_probs: torch.Tensor) -> list[dict]:
        """Put what `classify` found into records: {"class": name, "class_prob": 0..1}."""
        pairs = zip(class_numbers.tolist(), class_probs.tolist(), strict=True)
        return [{"class": self.names[number], "class_prob": prob} for number, prob in pairs]


def load_class_head(path: str | Path | None, device: torch.device) -> ClassHead | None:
    """Read the class head that lies beside the weights in a checkpoint; None where there is none.

    Args:
        path: of a checkpoint, or None, "auto" or "none" for weights without classes.
    """
    if path in (None, "auto", "none"):
        return None
    state = load_checkpoint(Path(path))
    if "class_head" not in state:
        return None
    return make_head(state["classes"], state["class_head"]).to(device)


def make_head(names: list[str], weights: dict[str, torch.Tensor]) -> ClassHead:
    """Make a head with the weights of a checkpoint."""
    head = ClassHead(names, weights["layers.0.weight"].shape[1])
    head.load_state_dict(weights)
    return head.eval()


# ---------------------------------------------------------------------------------------------------------------------
# which classes, and what counts how much


def choose_classes(choice: list | str | None, counts: dict[str, dict[str, int]]) -> list[str]:
    """Name the classes that a run learns.

    Args:
        choice: a list of names, or "auto": all that training objects have, sorted.
        counts: {"train": {name: objects}, "val": ...}, "" for objects without a class.
    Raises:
        ValueError: for a name that no training object has, or that is no name; where no object has a class.
    """
    present = {name: count for name, count in counts["train"].items() if name}
    if not present:
        raise ValueError(
            f"classes is {choice}, but no training object has a class: the dataset gives none; use classes=null, or a "
            "format with classes (data/README.md)"
        )
    names = sorted(present) if choice == "auto" else list(choice)
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"classes has {doubled[0]} {names.count(doubled[0])} times; name each class once")
    if NONE in names:
        raise ValueError(f'classes has "{NONE}", which is what the head calls all else; rename that class')
    listed = ", ".join(first_few([f"{name} {count}" for name, count in sorted(present.items())], 20))
    if absent := [name for name in names if name not in present]:
        raise ValueError(f"classes has {absent[0]}, which no training object is; they are: {listed}")
    others = sum(count for name, count in present.items() if name not in names)
    print(
        f"classes: {', '.join(first_few(names, 20))}"
        + (f'; {others} training objects of other classes are "{NONE}"' if others else "")
        + (f"; {counts['train']['']} without a class teach masks alone" if counts["train"].get("") else "")
    )
    if strangers := [name for name in counts["val"] if name and name not in present]:
        print(f'classes that validation alone has, which are "{NONE}": {", ".join(first_few(strangers, 20))}')
    for name in names:
        if not counts["val"].get(name):
            print(f"class {name}: no validation object is of it, so its accuracy and precision are not measured")
    return names


def weigh_classes(weights: dict | str | None, names: list[str], counts: dict[str, int]) -> torch.Tensor:
    """Give the weights of "none" and of each class in the loss, (1 + names,), 1 on average over the objects.

    Args:
        weights: {name: weight}, 1 for those that are not in it; "auto": one over the root of each class's number of
            objects; None: 1 each.
        counts: training objects of each class.
    Raises:
        ValueError: for a name that is none of the classes.
    """
    if weights is None:
        return torch.ones(1 + len(names))
    if weights == "auto":
        numbers = torch.tensor([float(counts.get(name, 1)) for name in names])  # 1: a resumed run's may be gone
        of_names = numbers**-0.5
        of_names = of_names * numbers.sum() / (of_names * numbers).sum()
        return torch.cat([torch.ones(1), of_names])
    weights = {str(name): weight for name, weight in weights.items()}
    if strange := [name for name in weights if name not in (NONE, *names)]:
        raise ValueError(
            f"class_head.class_weights has {strange[0]}; must be among {', '.join(first_few([NONE, *names], 20))}"
        )
    return torch.tensor([float(weights.get(name, 1)) for name in (NONE, *names)])


def class_targets(instances: Instances, objects: list[tuple[int, int]], names: list[str]) -> list[int]:
    """Give the right answer for each object, (layer, id): 1 + place in `names`, 0 for another class, or UNKNOWN."""
    places = {name: 1 + place for place, name in enumerate(names)}
    said = [instances.annotations[object_id - 1] if instances.annotations else {} for _, object_id in objects]
    given = [class_name(annotation) for annotation in said]
    return [places.get(name, 0) if name else UNKNOWN for name in given]
