"""annotate.stage=rate: a person gives each mask of two folders a mark of 1 to 10, without knowing whose it is.

Source: Kirillov et al. 2023 (Segment Anything), appendix E (human study of mask quality).
"""

import csv
import math
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from utils import images
from utils.instances import label_folder

COLUMNS = ["results", "picture", "id", "rating"]
LOWEST, HIGHEST = 1, 10


class RatedMask(NamedTuple):
    """A mask to rate: which folder it is from, which picture it is of, and its number in the record, from 0."""

    results: str
    number: int  # of the picture, in the list of pictures
    place: int


class Rating:
    """Masks of two folders in one random order, and the marks that they have got; each mark is on disk at once."""

    def __init__(self, results: list[str], pictures: list[images.Picture], labels_dir: Path, seed: int):
        """List the masks of pictures that are there, and read the marks of earlier times.

        Args:
            results: two folders of labels, or of the json files of infer_sam2.py.
            labels_dir: ratings.csv is written there.
        Raises:
            ValueError, FileNotFoundError: for a folder without masks of these pictures, and for marks of other masks.
        """
        if Path(results[0]).resolve() == Path(results[1]).resolve():
            raise ValueError(f"results is {results}; must be two folders")
        self.results, self.pictures, self.path = results, pictures, labels_dir / "ratings.csv"
        self.paths = [label_folder.list_records(Path(folder)) for folder in results]
        masks = []
        for folder, paths in zip(results, self.paths, strict=True):
            before = len(masks)
            for number, picture in enumerate(pictures):
                if (path := paths.get(unicodedata.normalize("NFC", picture.name))) is not None:
                    record = label_folder.skim_record(path)
                    masks += [RatedMask(folder, number, place) for place in range(len(record["annotations"]))]
            if len(masks) == before:
                raise ValueError(f"results has {folder}, which has no mask of a picture of input=; give its pictures")
        order = np.random.default_rng(seed).permutation(len(masks))
        self.masks = [masks[index] for index in order]  # what the page calls an item is a place in this list
        self.ratings: dict[RatedMask, int] = self._read_ratings()

    def _read_ratings(self) -> dict[RatedMask, int]:
        if not self.path.exists():
            with self.path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerow(COLUMNS)
        numbers = {picture.name: number for number, picture in enumerate(self.pictures)}
        known, ratings = set(self.masks), {}
        with self.path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    mask = RatedMask(row["results"], numbers[row["picture"]], int(row["id"]) - 1)
                    rating = int(row["rating"])
                except (KeyError, TypeError, ValueError):
                    mask, rating = None, 0
                if mask not in known:
                    raise ValueError(
                        f"{self.path} has {', '.join(map(str, row.values()))}, which is of none of these masks; "
                        "move the file away, or take the same results= and input="
                    )
                ratings[mask] = rating
        return ratings

    def next_item(self) -> int | None:
        """Return the first item without a mark; None where all have one."""
        return next((item for item, mask in enumerate(self.masks) if mask not in self.ratings), None)

    def read_mask(self, item: int) -> np.ndarray:
        """Read the mask of an item: int32 (H, W), 1 where it is.

        Raises:
            ValueError: for a file that is no record of masks.
        """
        mask = self.masks[item]
        name = unicodedata.normalize("NFC", self.pictures[mask.number].name)
        path = self.paths[self.results.index(mask.results)][name]
        record = label_folder.read_record(path)
        orig_hw = record["image"]["height"], record["image"]["width"]
        return label_folder.draw_map(record["annotations"][mask.place : mask.place + 1], orig_hw)

    def rate(self, item: int, rating: int) -> None:
        """Write a mark down."""
        mask = self.masks[item]
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([mask.results, self.pictures[mask.number].name, mask.place + 1, rating])
        self.ratings[mask] = rating

    def summarise(self) -> dict[str, dict[str, float]]:
        """Summarise the marks of each folder: {folder: {"mean", "low", "high", "masks"}}, as `describe_mean` has it."""
        return {
            folder: describe_mean([rating for mask, rating in self.ratings.items() if mask.results == folder])
            for folder in self.results
        }


def describe_mean(ratings: list[int]) -> dict[str, float]:
    """Give the mean of marks and its 95 % interval by Student's t, nan where there are too few.

    Returns:
        {"mean", "low", "high", "masks": how many}.
    """
    count = len(ratings)
    mean = float(np.mean(ratings)) if count else math.nan
    half = float(stdtrit(count - 1, 0.975) * np.std(ratings, ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "masks": count}
