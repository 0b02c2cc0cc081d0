"""Image-text sets of any size in tar shards, as webdataset and img2dataset write them: read in order, mixed in a buffer.

A shard is a tar file in which the members of one sample follow each other under one key: `000017.jpg`, `000017.txt` (or
`000017.json` with a "caption"). Nothing is unpacked: a picture is read at its place in the tar when it is decoded, so that
passing over samples, to resume or because they are another process', costs their headers and captions alone. Memory holds
one buffer of names and captions.
"""

from __future__ import annotations

import io
import json
import random
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from xdiffusion.data.buckets import Size
from xdiffusion.data.captions import PREVIEWED, fault_in, preview_table
from xdiffusion.data.image_files import DamagedImage, Picture
from xdiffusion.data.image_set import Batch, to_unit_range
from xdiffusion.data.tar_members import BLOCK, Member, tar_members
from xdiffusion.places import looked_for_in

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_SHARDS = 100_000
MAX_DAMAGED = 100  # pictures one after another
NAMED = 10  # of the samples that are skipped
HELD = 2**16  # names and captions of the pictures asked for last: two batches, whose rows may come in any order


class ShardError(ValueError):
    """A shard that cannot be read, or a sample in it: which, and why."""


def load_shards(
    image_size: int,
    seed: int,
    data_dir: str | None = None,
    *,
    buffer: int = 1000,
    random_crop: bool = False,
    flip: bool = False,
) -> Shards:
    """The shards of a folder or a pattern, and one printed line about them.

    Args:
        image_size: side of the square that every picture is scaled and cropped to.
        seed: of the order; a run's.
        data_dir: a folder of .tar files, one such file, or a pattern of them such as "laion/{00000..00041}.tar".
        buffer, random_crop, flip: see `Shards`.

    Raises:
        ShardError: if there are none, or the first cannot be read.
    """
    if data_dir is None:
        raise ShardError("image/shards needs its tar files: --data_dir FOLDER, or 'FOLDER/{00000..00041}.tar'")
    shards = Shards(shard_paths(data_dir), image_size, seed=seed, buffer=buffer, random_crop=random_crop, flip=flip)
    size = sum(shard.stat().st_size for shard in shards.shards)
    print(f"{shards.name} {data_dir}: {len(shards.shards)} shards of {size:,} bytes; the first: {shards.prompts.names}")
    return shards


def shard_paths(data_dir: str) -> list[Path]:
    """The .tar files that a folder holds or a pattern stands for.

    Raises:
        ShardError: if there are none, or the pattern has no such numbers.
    """
    pattern = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", data_dir)
    if pattern:
        before, first, last, after = pattern.groups()
        if not 0 <= int(last) - int(first) < MAX_SHARDS or "{" in before:
            raise ShardError(
                f"--data_dir {data_dir}: a pattern has one pair of numbers {{FIRST..LAST}}, rising, for up to "
                f"{MAX_SHARDS:,} files"
            )
        return [Path(f"{before}{number:0{len(first)}}{after}") for number in range(int(first), int(last) + 1)]
    path = Path(data_dir)
    found = sorted(path.glob("[!.]*.tar")) if path.is_dir() else [path]  # a dot begins what macOS adds
    if not found:
        raise ShardError(f"--data_dir {data_dir} holds no .tar file")
    return found


class Shards:
    """A set in several shards, as one endless, mixed, repeatable sequence of pictures.

    Args:
        shards: tar files, uncompressed; each epoch reads them in another order.
        image_size: side of the square that pictures are scaled and cropped to.
        seed: of the order.
        buffer: pictures among which the next is drawn.
        random_crop: crop somewhere, not at the centre.
        flip: mirror every other picture at random.

    Raises:
        ShardError: if there is none, one is missing, or the first cannot be read.
    """

    name = "image/shards"
    channels = 3

    def __init__(
        self,
        shards: Sequence[Path],
        image_size: int,
        *,
        seed: int = 0,
        buffer: int = 1000,
        random_crop: bool = False,
        flip: bool = False,
    ):
        self.shards = sorted(shards)
        self.image_size = image_size
        self.seed = seed
        self.buffer = buffer
        self.random_crop = random_crop
        self.flip = flip
        self.damaged: dict[str, str] = {}
        if not self.shards:
            raise ShardError("no shards are named")
        missing = [shard for shard in self.shards if not shard.is_file()]
        if missing:
            raise ShardError(f"no shard at {', '.join(map(str, missing[:3]))}{looked_for_in(missing[0])}")
        if buffer < 1:
            raise ShardError(f"data.buffer={buffer} must be at least 1")
        usable = (picture for picture in read_shard(self.shards[0]) if picture.caption is not None)
        self.prompts = preview_table(picture.caption for picture in islice(usable, PREVIEWED))
        self._coming = self.pictures()
        self._next = 0
        self._held: dict[int, Picture] = {}

    def pictures(self, first: int = 0) -> Iterator[Picture]:
        """All pictures from number `first` of the sequence on, epoch after epoch, without an end.

        Every epoch has as many pictures: those between the first one and that of `first` are not read.
        """
        epoch, number, length = 0, 0, 0
        while True:
            for picture in self._epoch(epoch):
                if number >= first:
                    yield picture
                number += 1
            length = length or number
            passed = max(0, first - number) // length
            epoch, number = epoch + 1 + passed, number + passed * length

    def batch(
        self,
        index: Int[Tensor, " B"],
        wording: Float[Tensor, " B"],
        moves: Float[Tensor, "3 B"],
        size: Size | None = None,
    ) -> Batch:
        """The pictures of some numbers of the sequence; quick where they rise from call to call.

        One that cannot be decoded is replaced by the next of the sequence that can; a label is a picture's number.

        Args:
            index: numbers, any.
            wording: not used: a picture has one caption.
            moves: in [0, 1): flip, top and left.
            size: (height, width), where it is not image_size.

        Raises:
            ShardError: if MAX_DAMAGED pictures one after another cannot be decoded.
        """
        images, captions, labels = [], [], []
        for number, flip, *place in zip(index.tolist(), *moves.tolist()):
            label, picture, image = self._whole(number, size or (self.image_size,) * 2, place)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            images.append(pixels.flip(2) if self.flip and flip < 0.5 else pixels)
            captions.append(picture.caption)
            labels.append(label)
        return Batch(to_unit_range(torch.stack(images)), torch.tensor(labels), captions)

    def _whole(self, first: int, size: Size, place: Sequence[float]) -> tuple[int, Picture, Image.Image]:
        for number in range(first, first + MAX_DAMAGED):
            picture = self._at(number)
            try:
                return number, picture, picture.pixels(size, *(place if self.random_crop else ()))
            except DamagedImage as error:
                if picture.name not in self.damaged:
                    self.damaged[picture.name] = str(error)
                    print(f"warning: {picture.name} is replaced by the next picture: {error}", file=sys.stderr)
        raise ShardError(f"{self.name}: {MAX_DAMAGED} pictures in a row cannot be decoded, the last {picture.name}")

    def _at(self, number: int) -> Picture:
        if number not in self._held:
            if not self._next <= number < self._next + HELD:  # of long before, or of a run that is resumed
                self._coming, self._next, self._held = self.pictures(number), number, {}
            while self._next <= number:
                self._held[self._next] = next(self._coming)
                self._held.pop(self._next - HELD, None)
                self._next += 1
        return self._held[number]

    def _epoch(self, epoch: int) -> Iterator[Picture]:
        draw = random.Random(f"{self.seed}|shards|{epoch}")  # a str seed is hashed the same way everywhere
        shards = draw.sample(self.shards, len(self.shards))
        held: list[Picture] = []
        skipped = 0
        for picture in (picture for shard in shards for picture in read_shard(shard)):
            if picture.caption is None:
                skipped += 1
                if epoch == 0 and skipped <= NAMED:
                    more = "; more of them are not named" * (skipped == NAMED)
                    print(f"warning: {picture.name} is skipped: {picture.uncaptioned}{more}", file=sys.stderr)
                continue
            if len(held) < self.buffer:
                held.append(picture)
                continue
            chosen = draw.randrange(self.buffer)
            yield held[chosen]
            held[chosen] = picture
        if not held:
            raise ShardError(f"{self.name}: none of {skipped} samples can be used, the last {picture.name}")
        draw.shuffle(held)
        yield from held
        if epoch == 0 and skipped:
            print(f"{self.name}: {skipped} samples skipped, as in every epoch", file=sys.stderr)


def read_shard(shard: Path) -> Iterator[Picture]:
    """The pictures of one shard with their captions, in its order; their bytes are read when they are opened.

    A sample without a picture or a caption, or with one that is none, has caption None, and `uncaptioned` says why.

    Raises:
        ShardError: if it is missing, no tar file or a cut one, a member is a link or device, its name leads out of the
            shard or its size is above MAX_IMAGE_BYTES or MAX_TEXT_BYTES.
    """
    if not shard.is_file():
        raise ShardError(f"no shard at {shard}")
    length = shard.stat().st_size
    if length % BLOCK:
        raise ShardError(f"{shard} is cut: its {length:,} bytes are no multiple of {BLOCK}")
    key, picture, caption = None, None, None
    try:
        with shard.open("rb") as file:
            for member in tar_members(shard):
                hidden = PurePosixPath(member.name).name.startswith(".")  # what macOS adds to all that it packs
                if member.is_folder or hidden:
                    continue
                member_key, kind = _checked(shard, member, length)
                if member_key != key:
                    if key is not None:
                        yield _sample(shard, key, picture, caption)
                    key, picture, caption = member_key, None, None
                if kind in IMAGES:
                    picture = member
                elif kind == "txt" or (kind == "json" and caption is None):
                    file.seek(member.start)
                    caption = _caption_of(file.read(member.size), kind) or caption
    except ShardError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise ShardError(f"{shard} cannot be read: {error}") from error
    if key is None:
        raise ShardError(f"{shard} holds no sample")
    yield _sample(shard, key, picture, caption)


def _checked(shard: Path, member: Member, length: int) -> tuple[str, str]:
    """The key and the kind of a member whose header can be trusted."""
    path = PurePosixPath(member.name)
    if not member.is_file or path.is_absolute() or ".." in path.parts:
        raise ShardError(f"{shard}: member {member.name!r:.100} is no plain file inside the shard")
    stem, _, kind = path.name.partition(".")
    kind = kind.lower()
    limit = MAX_TEXT_BYTES if kind in TEXTS else MAX_IMAGE_BYTES
    if not 0 <= member.size <= limit or member.start + member.size > length:
        raise ShardError(
            f"{shard}: member {member.name!r:.100} says it has {member.size:,} bytes; allowed {limit:,}, within the file"
        )
    return str(path.with_name(stem)), kind


def _sample(shard: Path, key: str, member: Member | None, caption: str | None) -> Picture:
    why = fault_in(caption) if caption else "no caption, or none in UTF-8"
    why = f"no {', '.join(IMAGES)}" if member is None else why

    def read() -> io.BytesIO:
        with shard.open("rb") as file:
            file.seek(member.start)
            return io.BytesIO(file.read(member.size))

    name = f"{shard.name}/{key}"
    return Picture(name, None, read, uncaptioned=why) if why else Picture(name, caption, read)


def _caption_of(stored: bytes, kind: str) -> str | None:
    try:
        text = stored.decode("utf-8-sig")
        if kind == "txt":
            return text.strip()
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    caption = content.get("caption") if isinstance(content, dict) else None
    return caption.strip() if isinstance(caption, str) else None
