"""What a frozen image encoder computes, kept on disk: each picture is encoded once, for this run and all later ones.

`plan_cache` finds the entry of each picture and which are missing, `fill_cache` makes those, `read_entry` reads one.
`embed` makes embeddings of pictures and of what was read alike.

An entry is a file <folder>/<2 hex>/<key>.emb for one picture, as it is or mirrored. Its key is a hash of all that its
content depends on (see `entry_key`), so other weights or another picture of the same name are another file: nothing is
ever out of date, and the folder can be deleted at any time. The file holds a header of HEADER_BYTES (json, padded with
spaces), the maps in the order of their memory, and a footer (the key again, and the CRC-32 of all before it). It is
written under another name, then renamed: a killed run, or two that fill one folder, leave no half entry.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm

from utils import ranks
from utils.images import read_image
from utils.run import REPOSITORY, autocast, may_overlap, num_cores
from utils.sam2 import model as models
from utils.sam2.model import Embeddings, FrozenMaps
from utils.settings import Rule, one_of

HIGH_RES_CONVS = ("sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.")  # what `project_high_res` ends with
FORMAT = 1  # goes up when entries change, or what leads to them: reading a picture, preprocess, encode_frozen
HEADER_BYTES, FOOTER_BYTES = 4096, 64 + 8
STORED_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
Setting = Annotated[str | bool, Rule(lambda setting: setting not in ("", True), "auto, off, or a folder")]  # `cache`
Precision = Annotated[str, one_of(*STORED_DTYPES)]  # `cache_precision`
ABANDONED_S = 3600  # a .tmp file this old is that of a killed run


@dataclass(frozen=True)
class CachePlan:
    """The entries that a run needs. A picture is (its file, whether it is mirrored)."""

    entries: dict[tuple[Path, bool], Path]
    missing: list[tuple[Path, bool]]  # to be encoded first; two of the same bytes share an entry
    is_projected: bool  # through conv_s0 and conv_s1, which are frozen too; see `model.FrozenMaps`
    stored: str  # fp16 or fp32, on disk
    precision: str  # fp32, bf16 or fp16, in which the encoder computes


# ---------------------------------------------------------------------------------------------------------------------
# pictures, or what is kept of them -> embeddings


def embed(model: torch.nn.Module, pictures: torch.Tensor | FrozenMaps) -> Embeddings:
    """Make the embeddings of B pictures: encode them, or finish what a frozen encoder has made of them.

    Args:
        model: from `build_sam2`.
        pictures: float (B, 3, S, S), S = model.image_size; or FrozenMaps from the cache. On any device.
    Returns:
        Embeddings on the model's device.
    """
    if isinstance(pictures, torch.Tensor):
        return models.encode(model, pictures.to(model.device, non_blocking=may_overlap(model.device)))
    return models.finish_embeddings(model, restore_maps(pictures, model.device))


def restore_maps(maps: FrozenMaps, device: torch.device) -> FrozenMaps:
    """Bring maps from the cache to a device, then to the types in which the encoder gave them."""
    pairs = zip(maps[:3], maps.dtypes, strict=True)
    levels = (level.to(device, non_blocking=may_overlap(device)).to(dtype) for level, dtype in pairs)
    return FrozenMaps(*levels, maps.is_projected)


def join_pictures(parts: list[torch.Tensor] | list[FrozenMaps]) -> torch.Tensor | FrozenMaps:
    """Join what `embed` takes of single pictures in the axis B; the maps of one picture stay where they are, mapped."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if len(parts) == 1:
        return first
    assert all(part[3:] == first[3:] for part in parts), [part[3:] for part in parts]  # one plan, one kind of entry
    return FrozenMaps(*(torch.cat(levels) for levels in list(zip(*parts, strict=True))[:3]), *first[3:])


# ---------------------------------------------------------------------------------------------------------------------
# which entries there are, and which are needed


def plan_cache(
    model: torch.nn.Module,
    setting: str | bool,
    stored: str,
    precision: str,
    is_projected: bool,
    pictures: list[tuple[Path, bool]],
    obstacle: str | None,
) -> CachePlan | None:
    """Find the entry of each picture, say how much is still to be written, and check that there is room.

    Args:
        model: from `build_sam2`, on its device.
        setting: the key `cache`: off, auto (data/embedding_cache of the repository, or nothing if that cannot be), or a
            folder, which is made if the folder that it lies in exists.
        stored: fp16 or fp32, on disk.
        precision: of the encoder, as `choose_precision` returns it.
        is_projected: whether conv_s0 and conv_s1 are frozen too.
        pictures: (file, whether it is mirrored) of all that the run will read.
        obstacle: why this run cannot use a cache, or None.
    Returns:
        the plan, or None for no cache.
    Raises:
        ValueError: where a folder is asked for and cannot be used, naming what is in the way.
    """
    if setting in ("off", False):  # YAML turns off into false where it has no quotes
        return None
    is_auto = setting == "auto"
    folder = REPOSITORY / "data" / "embedding_cache" if is_auto else Path(setting)
    if obstacle is None:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:  # a file, a folder that is not there or not ours, a disk that is read-only
            obstacle = f"the folder {folder} cannot be made ({error.strerror or error})"
    if obstacle is None:
        remove_abandoned(folder)
        recipe = describe_recipe(model, is_projected, stored, precision)
        entries, missing, num_damaged = list_entries(folder, recipe, pictures)
        num_all, num_new = len(set(entries.values())), len({entries[picture] for picture in missing})
        num_bytes = num_new * count_entry_bytes(model, is_projected, stored)
        free_bytes = shutil.disk_usage(folder).free
        if missing and not os.access(folder, os.W_OK):
            obstacle = f"the folder {folder}, in which {num_new} entries are missing, may not be written"
        elif num_bytes > (free_bytes / 2 if is_auto else free_bytes):
            obstacle = (
                f"its {num_new} new entries take {num_bytes / 2**20:,.1f} MiB and {folder} has "
                f"{free_bytes / 2**20:,.1f} MiB free" + (", of which half may be used" if is_auto else "")
            )
    if obstacle is None:
        print(
            f"cache: {num_all - num_new} pictures in {folder}, {num_new} to encode ({num_bytes / 2**20:,.1f} MiB; "
            f"{free_bytes / 2**20:,.1f} MiB free)"
            + (f"; {num_damaged} damaged entries are made again" if num_damaged else "")
        )
        return CachePlan(entries, missing, is_projected, stored, precision)
    if is_auto:
        print(f"cache=auto: no cache, because {obstacle}")
        return None
    raise ValueError(f"cache is {setting}, but {obstacle}; change that, or use cache=off")


def describe_recipe(model: torch.nn.Module, is_projected: bool, stored: str, precision: str) -> tuple:
    """List all that the content of entries depends on but the pictures; each device type rounds in its own way."""
    computed = f"{model.device.type} {precision}" + (", resized there" if model.device.type == "cuda" else "")
    return FORMAT, hash_weights(model, is_projected), model.image_size, is_projected, stored, computed


def hash_weights(model: torch.nn.Module, is_projected: bool) -> str:
    """Hash the weights that the entries come from: the image encoder's, and conv_s0's and conv_s1's if they are in."""
    prefixes = ("image_encoder.", *HIGH_RES_CONVS) if is_projected else ("image_encoder.",)
    weights_hash = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            weights_hash.update(f"{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
            weights_hash.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return weights_hash.hexdigest()


def entry_key(recipe: tuple, picture_hash: str, is_mirrored: bool) -> str:
    """Name an entry by all that its content depends on: 64 hex digits.

    Args:
        recipe: from `describe_recipe`.
        picture_hash: of the bytes of the picture's file.
    """
    return hashlib.sha256(repr((*recipe, picture_hash, is_mirrored)).encode()).hexdigest()


def list_entries(
    folder: Path, recipe: tuple, pictures: list[tuple[Path, bool]]
) -> tuple[dict[tuple[Path, bool], Path], list[tuple[Path, bool]], int]:
    """Find the entry of each picture; read each entry once and compare its checksum, in threads.

    Checked here, damage is found while it can still be repaired, and reading an entry later costs nothing more.

    Returns:
        entries and missing as in `CachePlan`; how many entries are there but damaged.
    """
    image_paths = list(dict.fromkeys(image_path for image_path, _ in pictures))
    with ThreadPoolExecutor(min(16, num_cores())) as executor:
        contents_hashes = executor.map(lambda path: hashlib.sha256(path.read_bytes()).hexdigest(), image_paths)
        hashes = dict(zip(image_paths, contents_hashes, strict=True))
        entries = {}
        for image_path, is_mirrored in pictures:
            key = entry_key(recipe, hashes[image_path], is_mirrored)
            entries[image_path, is_mirrored] = folder / key[:2] / f"{key}.emb"
        paths = list(dict.fromkeys(entries.values()))
        checks = tqdm(executor.map(is_whole, paths), "check cache", len(paths), leave=False, mininterval=1)
        unready = {path for path, is_ready in zip(paths, checks, strict=True) if not is_ready}
    missing = [picture for picture, path in entries.items() if path in unready]
    return entries, missing, sum(path.exists() for path in unready)


def count_entry_bytes(model: torch.nn.Module, is_projected: bool, stored: str) -> int:
    """Compute the size of an entry's file."""
    decoder, trunk_channels = model.sam_mask_decoder, model.image_encoder.trunk.channel_list  # coarsest first
    channels = [trunk_channels[-1], trunk_channels[-2], model.image_encoder.neck.d_model]
    if is_projected:
        channels[:2] = decoder.conv_s0.out_channels, decoder.conv_s1.out_channels
    strides = (4, 8, 16)
    num_values = sum(count * (model.image_size // stride) ** 2 for count, stride in zip(channels, strides, strict=True))
    return HEADER_BYTES + num_values * STORED_DTYPES[stored].itemsize + FOOTER_BYTES


def remove_abandoned(folder: Path) -> None:
    """Remove what killed runs were writing; an entry takes seconds, so a young file is that of a living run."""
    for path in folder.glob("*/*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()
        except OSError:  # its run is alive and has renamed it, or it is another user's
            continue


# ---------------------------------------------------------------------------------------------------------------------
# encode and write


def fill_cache(model: torch.nn.Module, plan: CachePlan) -> None:
    """Encode the missing pictures, one at a time, and write their entries.

    Where several processes train, each encodes its share.

    Args:
        model: in eval mode, on its device, with the weights of the plan.
    Raises:
        FileNotFoundError, ValueError: for a picture that cannot be read, and as `write_entry`.
    """
    groups = [list(group) for _, group in itertools.groupby(plan.missing, key=lambda picture: picture[0])]
    own = [group for _, group in ranks.share(groups)]
    progress = tqdm(total=sum(map(len, own)), desc="cache", unit=" images", disable=None if own else True)
    for group in own:
        image_path, _ = group[0]
        image_rgb = read_image(image_path)  # (H, W, 3), once for both
        for picture in group:
            if not is_whole(plan.entries[picture]):  # another process may fill the same folder
                fill_entry(model, plan, picture, image_rgb)
            progress.update()
    progress.close()
    ranks.wait()


@torch.no_grad()
def fill_entry(model: torch.nn.Module, plan: CachePlan, picture: tuple[Path, bool], image_rgb: np.ndarray) -> None:
    """Encode one picture and write its entry: as `fill_cache`, with the picture uint8 (H, W, 3), not mirrored."""
    image_path, is_mirrored = picture
    image = models.preprocess(image_rgb[:, ::-1] if is_mirrored else image_rgb, model.image_size, model.device)
    with autocast(model.device, plan.precision):
        maps = models.encode_frozen(model, image[None])
        if plan.is_projected:
            maps = models.project_high_res(model, maps)
    write_entry(plan.entries[picture], maps, plan.stored, image_path)


def write_entry(path: Path, maps: FrozenMaps, stored: str, image_path: Path) -> None:
    """Write an entry whole or not at all.

    Args:
        path: <folder>/<2 hex>/<key>.emb.
        maps: of one picture, as the encoder gave them.
        stored: fp16 or fp32.
        image_path: for messages.
    Raises:
        ValueError: for values that are not finite or too large for fp16, and where the disk cannot be written.
    """
    records, blocks = [], []
    for level in maps[:3]:
        assert len(level) == 1, level.shape
        largest = max(-level.min().item(), level.max().item())
        if not math.isfinite(largest):
            raise ValueError(f"the image encoder gives nan or infinity for {image_path}; use precision=fp32")
        if largest > torch.finfo(STORED_DTYPES[stored]).max:
            raise ValueError(
                f"the image encoder gives {largest:.0f} for {image_path}, which fp16 cannot hold (at most 65504); "
                "use cache_precision=fp32"
            )
        # the order of memory is kept: convolutions choose their algorithm, and so their rounding, by it
        is_channels_last = level.is_contiguous(memory_format=torch.channels_last) and not level.is_contiguous()
        ordered = level.detach().permute(0, 2, 3, 1) if is_channels_last else level.detach()
        blocks.append(ordered.to("cpu", STORED_DTYPES[stored]).contiguous().numpy().data.cast("B"))
        dtype = str(level.dtype).removeprefix("torch.")
        records.append({"shape": list(level.shape), "dtype": dtype, "is_channels_last": is_channels_last})
    key = path.stem
    header = {"format": FORMAT, "key": key, "stored": stored, "is_projected": maps.is_projected, "maps": records}
    content = b"".join([json.dumps(header).encode().ljust(HEADER_BYTES), *blocks])

    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # a name of its own: two runs may write it
    try:
        path.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.write(_footer(key, content))
            file.flush()
            os.fsync(file.fileno())  # the bytes must be on disk before the name points at them
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(
            f"cache entry {path} cannot be written ({error.strerror}); use another folder, or cache=off"
        ) from error
    finally:
        partial.unlink(missing_ok=True)  # also after Ctrl-C


def _footer(key: str, content: bytes | np.ndarray) -> bytes:
    return f"{key}{zlib.crc32(content):08x}".encode()


# ---------------------------------------------------------------------------------------------------------------------
# read


def is_whole(path: Path) -> bool:
    """Tell whether an entry is there, of its own name, and undamaged to the last bit."""
    try:
        content = _map_file(path)
    except (OSError, ValueError):
        return False
    return content[-FOOTER_BYTES:].tobytes() == _footer(path.stem, content[:-FOOTER_BYTES])


def read_entry(path: Path) -> FrozenMaps:
    """Map an entry into memory; its bytes are read when they are used, and left to the system's page cache.

    Args:
        path: of an entry that `is_whole`.
    Returns:
        FrozenMaps of one picture, which lie in the mapped file: what `embed` and `join_pictures` take.
    Raises:
        ValueError: for an entry that was removed or damaged after that.
    """
    try:
        content = _map_file(path)
        header = json.loads(content[:HEADER_BYTES].tobytes())
        joined = torch.from_numpy(content[HEADER_BYTES:-FOOTER_BYTES]).view(STORED_DTYPES[header["stored"]])
        blocks = joined.split([math.prod(record["shape"]) for record in header["maps"]])
    except (OSError, ValueError, RuntimeError) as error:  # the last from view and split: it has too few or many bytes
        raise ValueError(f"cache entry {path} was removed or damaged during the run ({error}); start again") from error
    maps = []
    for block, record in zip(blocks, header["maps"], strict=True):
        batch, channels, height, width = record["shape"]
        if record["is_channels_last"]:
            maps.append(block.view(batch, height, width, channels).permute(0, 3, 1, 2))
        else:
            maps.append(block.view(batch, channels, height, width))
    return FrozenMaps(*maps, header["is_projected"], [getattr(torch, record["dtype"]) for record in header["maps"]])


def _map_file(path: Path) -> np.ndarray:
    """Map a file, uint8 (N,), as a private copy: torch wants memory that can be written; the file never changes."""
    return np.asarray(np.memmap(path, np.uint8, "c"))
