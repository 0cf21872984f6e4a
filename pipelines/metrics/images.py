"""Images from wherever people keep them, as one array.

| source | how it is told apart | labels |
| --- | --- | --- |
| a folder of image files, searched in depth | it is a directory | none |
| the folder of a sample artifact | a directory with `manifest.json` and `samples.npz` | arr_1 |
| `.npz` in guided-diffusion's layout | a zip of nothing but `.npy` members | arr_1, where it is there |
| `.zip`, `.tar`, `.tar.gz`, `.tar.xz`, … of image files | its content | none |

Whatever a file is called says nothing but its place in the order: "2.png" comes before "10.png". Nothing is ever
unpickled, and an archive's members are read in memory, never written to disk, so a member's path can do no harm.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import re
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from pipelines.errors import FileFault
from pipelines.events import Report
from pipelines.memory import free_bytes
from pipelines.workspace.seals import sha256_of_file

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm"})
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")  # the decoders that Pillow may use
LOSSY_FORMATS = frozenset({"JPEG", "WEBP"})
FEWEST = 2  # a covariance needs two images
MEMBER_BYTES = 256 * 2**20  # one file in an archive, decompressed
MEMBER_PIXELS = 8192 * 8192  # of one image
TOTAL_BYTES = 32 * 2**30  # all images, decoded; 50,000 of 256×256 RGB take 9.2 GiB
UNPACKED_BYTES, UNPACKED_TIMES = (
    2**30,
    100,
)  # an archive may unpack to the larger of this and so many times itself
MOST_SCANS = 100  # of a progressive JPEG, each of which goes over all its pixels; encoders write 10
MOST_CLASSES = 2**20  # labels are below it: counts of classes are arrays of this length
_DECOMPRESSORS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"\x5d\0\0": lzma.open}

# What Pillow, zlib, numpy and the archive readers raise on damaged input.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
          RuntimeError, AssertionError, MemoryError, struct.error, zlib.error, lzma.LZMAError, tarfile.TarError,
          tokenize.TokenError, zipfile.BadZipFile, Image.DecompressionBombError)  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, with what is known about them."""

    images: np.ndarray  # (N, H, W, C) uint8, C = 1 grey or 3 RGB
    labels: np.ndarray | None  # (N,) int64
    names: tuple[str, ...] | None  # file names in the order of `images`; None where the source has none
    source: str  # for people: the path, the artifact's id or the registered name
    sha256: str  # of the source: a file's bytes; a folder's sorted file names and hashes
    remarks: tuple[str, ...] = ()  # what was noticed in reading, that may move a score

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[1], self.images.shape[2]


@dataclass(frozen=True)
class _Files:
    """Encoded image files, in the order of their names; `read` yields (place in that order, bytes) in any order."""

    names: tuple[str, ...]
    read: Callable[[], Iterator[tuple[int, bytes]]]


def read_images(path: str | Path, source: str | None = None, report: Report | None = None) -> ImageSet:
    """All images at `path`; see the module's table. `source` is the name to show for them, the path unless given.

    Raises FileFault, naming the file or the archive's member, where something is missing, unreadable, no image, of
    another size than the first image, transparent or of more than 8 bits, and where fewer than two images are found.
    """
    path, source, report = Path(path), source or str(path), report or Report()
    place = images_file(path)
    sha256 = hash_of_images(path)
    if place.is_dir():
        found = _decode(_folder(place), place, report)
    elif (held := npz_arrays(place)) is not None:
        images, labels = _image_arrays(place, held)
        found = ImageSet(images, labels, None, "", "")
    else:
        with _naming(place):
            is_zip = zipfile.is_zipfile(place)
        is_tar = not is_zip and _is_tar(place)
        if not is_zip and not is_tar:
            raise FileFault(f"{place}: neither an image archive nor an .npz file", "give a folder of images, an .npz "
                            "(arr_0: uint8 NHWC), a .zip or .tar archive of images, or a sample artifact")  # fmt: skip
        found = _decode(_zip(place) if is_zip else _tar(place), place, report)
    if len(found) < FEWEST:
        count = f"{len(found)} image{'' if len(found) == 1 else 's'}"
        raise FileFault(f"{path}: holds {count}, scores need at least {FEWEST}", "give the folder or archive of all")
    return ImageSet(found.images, found.labels, found.names, source, sha256, found.remarks)


def hash_of_images(path: str | Path) -> str:
    """The sha256 that names the images at `path`, without decoding them."""
    place = images_file(Path(path))
    if place.is_file():
        return sha256_of_file(place)
    digest = hashlib.sha256()
    for name, file in _image_files(place):
        digest.update(f"{name}\0{sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def images_file(path: Path) -> Path:
    """Where the images of `path` are: a sample artifact's `samples.npz`, otherwise the path itself."""
    if not path.exists():
        raise FileFault(f"{path}: no such file or folder", "check the path")
    if not path.is_dir() and not path.is_file():
        raise FileFault(f"{path}: a pipe or a device", "save it to a file first")
    if path.is_dir() and (path / "manifest.json").is_file() and (path / "samples.npz").is_file():
        return path / "samples.npz"
    return path


def npz_arrays(path: Path) -> frozenset[str] | None:
    """The names of an .npz file's arrays; None for a file that is no zip of nothing but .npy members."""
    with _naming(path):
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    if not members or not all(member.filename.endswith(".npy") for member in members):
        return None
    _check_room(sum(member.file_size for member in members), str(path))
    return frozenset(member.filename.removesuffix(".npy") for member in members)


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file; never unpickles. Raises FileFault naming file and array."""
    arrays = {}
    for name in names:
        with _naming(f"{path}: {name}"), np.load(path, allow_pickle=False) as archive:
            arrays[name] = archive[name]
            if not isinstance(arrays[name], np.ndarray):  # numpy gives bytes where a member does not begin as an array
                raise ValueError("it is no array")
    return arrays


def pixels_hash(images: np.ndarray, labels: np.ndarray | None = None) -> str:
    """sha256 over the shape, the pixels and the labels: for images that come from no file."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()


def _check_room(size: int, what: str) -> None:
    """FileFault for more bytes than are ever read, or than the machine has free: a small file can claim many."""
    room = min(TOTAL_BYTES, free_bytes() or TOTAL_BYTES)
    if size > room:
        raise FileFault(
            f"{what}: would take {size / 2**30:.1f} GiB in memory, more than {room / 2**30:.1f} GiB",
            "score a part of them",
        )


@contextmanager
def _naming(file: object) -> Iterator[None]:
    """Turn a decoder's complaint into one that names the file."""
    try:
        yield
    except DAMAGE as error:
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        raise FileFault(
            f"{file}: cannot be read: {reason}", "it is damaged or of another kind: make it again"
        ) from error


def _natural(name: str) -> list[tuple[bool, int, str, str]]:
    """A sorting key under which "2.png" comes before "10.png", without reading numbers of any length as such."""
    parts = re.split(r"([0-9]+)", name)  # words and numbers in turns
    keys = []
    for place, part in enumerate(parts):
        number = part.lstrip("0") if place % 2 else ""
        if part:
            keys.append((bool(place % 2), len(number), number, part))
    return keys


def _is_image_name(name: str) -> bool:
    """Whether a file should be an image; hidden files and macOS's resource forks are passed over."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in path.parts)
    return not hidden and path.suffix.lower() in IMAGE_SUFFIXES


def _image_files(folder: Path) -> list[tuple[str, Path]]:
    """(name relative to the folder, path) of each image file, in natural order."""
    paths = ((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*"))
    return sorted(((name, file) for name, file in paths if _is_image_name(name) and file.is_file()),
                  key=lambda item: _natural(item[0]))  # fmt: skip


def _folder(folder: Path) -> _Files:
    files = _image_files(folder)

    def read() -> Iterator[tuple[int, bytes]]:
        for i, (_, file) in enumerate(files):
            with _naming(file), open(file, "rb") as opened:
                data = opened.read(MEMBER_BYTES + 1)
            yield i, _bounded(data, str(file))

    return _Files(tuple(name for name, _ in files), read)


def _zip(path: Path) -> _Files:
    with _naming(path), zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir() and _is_image_name(member.filename)]
    members.sort(key=lambda member: _natural(member.filename))
    most = _most_unpacked(path)  # members can lie over one another, so that few bytes are many files
    if sum(member.file_size for member in members) > most:
        raise FileFault(f"{path}: unpacks to more than {most / 2**30:.1f} GiB", "pack the images alone, once each")
    for member in members:
        if member.flag_bits & 1:
            raise FileFault(f"{path}: {member.filename} is encrypted", "pack it without a password")

    def read() -> Iterator[tuple[int, bytes]]:
        with zipfile.ZipFile(path) as archive:
            for i, member in enumerate(members):
                with _naming(f"{path}: {member.filename}"), archive.open(member) as file:
                    data = _bounded(file.read(MEMBER_BYTES + 1), f"{path}: {member.filename}")
                yield i, data

    return _Files(tuple(member.filename for member in members), read)


class _Unpacked:
    """A decompressed file as tarfile reads it, which fills memory with whatever a header claims: no more at a time than
    a member may have, and in all no more than a compressed archive of images could unpack to.
    """

    def __init__(self, file: IO[bytes], most: int):
        self._file, self._most = file, most

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MEMBER_BYTES:
            raise tarfile.ReadError(f"a header or member claims more than {MEMBER_BYTES / 2**20:.0f} MiB")
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        self._check(place)
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def _check(self, place: int) -> None:
        if place > self._most + MEMBER_BYTES:
            raise tarfile.ReadError(f"unpacks to more than {self._most / 2**30:.1f} GiB")


def _most_unpacked(path: Path) -> int:
    """The bytes to which a compressed archive of images could unpack."""
    return min(TOTAL_BYTES, max(UNPACKED_BYTES, UNPACKED_TIMES * path.stat().st_size))


@contextmanager
def _opened_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with open(path, "rb") as raw:
        head = raw.read(6)
    unpack = next((unpack for magic, unpack in _DECOMPRESSORS.items() if head.startswith(magic)), None)
    most = TOTAL_BYTES if unpack is None else _most_unpacked(path)
    with (unpack or open)(path, "rb") as file, tarfile.open(fileobj=_Unpacked(file, most), mode="r:") as archive:
        yield archive


def _is_tar(path: Path) -> bool:
    try:
        with _opened_tar(path):
            return True
    except DAMAGE:
        return False


def _tar(path: Path) -> _Files:
    with _naming(path), _opened_tar(path) as archive:
        kept, place = [], 0
        for place, member in enumerate(archive):
            if member.size > MEMBER_BYTES:
                raise FileFault(f"{path}: {member.name} takes {member.size / 2**20:.0f} MiB, the limit is 256 MiB",
                                "leave it out: no image is as large")  # fmt: skip
            if member.isreg() and _is_image_name(member.name):  # links are not followed
                kept.append((member.name, place))
    kept.sort(key=lambda item: _natural(item[0]))
    order = {place: i for i, (_, place) in enumerate(kept)}

    def read() -> Iterator[tuple[int, bytes]]:
        with _naming(path), _opened_tar(path) as archive:  # in file order: a compressed tar cannot seek cheaply
            for place, member in enumerate(archive):
                if place in order:
                    data = archive.extractfile(member).read()
                    yield order[place], data

    return _Files(tuple(name for name, _ in kept), read)


def _bounded(data: bytes, file: str) -> bytes:
    if len(data) > MEMBER_BYTES:
        raise FileFault(f"{file} takes more than {MEMBER_BYTES / 2**20:.0f} MiB", "leave it out: no image is as large")
    return data


def _decode(files: _Files, path: Path, report: Report) -> ImageSet:
    """Decode every file into one array. `path` only names them in errors."""
    images, first, lossy, done = None, None, 0, 0
    report.begin(f"reading {path}", len(files.names), unit="images")
    for i, data in files.read():
        name = f"{path / files.names[i]}" if path.is_dir() else f"{path}: {files.names[i]}"
        pixels, image_format = decode_image(data, name)
        lossy += image_format in LOSSY_FORMATS
        if images is None:
            _check_room(pixels.nbytes * len(files.names), f"{path}: {len(files.names)} images of {_shown(pixels)}")
            images, first = np.empty((len(files.names), *pixels.shape), np.uint8), name
        if pixels.shape[:2] != images.shape[1:3]:
            raise FileFault(f"{name}: {_shown(pixels)} pixels, but {first} has {_shown(images[0])}",
                            "scores need images of one size; remove or resize the odd ones")  # fmt: skip
        if pixels.shape[2] > images.shape[3]:  # colour after grey
            _check_room(3 * images.nbytes, f"{path}: {len(files.names)} images of {_shown(pixels)}")
            images = np.repeat(images, 3, axis=3)
        images[i] = pixels  # grey among colour spreads over the channels
        done += 1
        report.advance(done)
    report.end()
    if images is None:
        raise FileFault(f"{path}: holds no images", f"known image files: {', '.join(sorted(IMAGE_SUFFIXES))}")
    remarks = (f"{path}: {lossy} of {done} images are JPEG or WebP, whose losses move every score",) if lossy else ()
    return ImageSet(images, None, files.names, "", "", remarks)


def decode_image(data: bytes, name: str) -> tuple[np.ndarray, str]:
    """One encoded image as (H, W, 1 or 3) uint8, and its format's name. Raises FileFault, which names `name`."""
    with _naming(name):
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MEMBER_PIXELS:
                raise FileFault(
                    f"{name}: {image.width}×{image.height} pixels, at most {MEMBER_PIXELS} are read", "leave it out"
                )
            if data.startswith(b"\xff\xd8") and _scans(data) > MOST_SCANS:
                raise FileFault(f"{name}: a JPEG of more than {MOST_SCANS} scans", "save it again")
            image.verify()  # checksums, which decoding skips in part
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.load()
            image_format = image.format
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    raise FileFault(f"{name}: has transparent pixels", "flatten it onto a background first")
                image = image.convert("RGB")
            elif image.mode in ("P", "1"):
                image = image.convert("RGB" if image.mode == "P" else "L")
            if image.mode not in ("L", "RGB"):
                raise FileFault(f"{name}: mode {image.mode}, scores need 8-bit grey or RGB images", "convert it")
            pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), image_format


def _scans(data: bytes) -> int:
    """How many scans a JPEG has, by its markers: what stands inside a segment is passed over."""
    place, count = 2, 0
    while (place := data.find(b"\xff", place)) >= 0 and place + 4 <= len(data):
        kind = data[place + 1]
        if kind == 0xD9:  # the image's end, whatever follows
            break
        if kind == 0xFF:
            place += 1
        elif kind in (0x00, 0x01) or 0xD0 <= kind <= 0xD8:  # of coded pixels, or without a length
            place += 2
        else:
            count += kind == 0xDA
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return count


def _image_arrays(path: Path, held: frozenset[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """arr_0 (N, H, W, C) uint8 and, where there is one, arr_1 (N,) int64 of an .npz file."""
    if "arr_0" not in held:
        raise FileFault(f"{path}: holds {', '.join(sorted(held))} but no arr_0, so no images",
                        "statistics (mu, sigma, mu_s, sigma_s) can only be a reference")  # fmt: skip
    arrays = read_arrays(path, held & {"arr_0", "arr_1"})
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if images.dtype != np.uint8:
        raise FileFault(f"{path}: arr_0 is {images.dtype}, not uint8", "scale the images to 0…255 and round them")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        channels_first = images.ndim == 4 and images.shape[1] in (1, 3)
        hint = "transpose it to NHWC" if channels_first else "stack the images: guided-diffusion's layout"
        raise FileFault(f"{path}: arr_0 has shape {images.shape}, not (N, H, W, 1 or 3)", hint)
    if labels is not None:
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise FileFault(f"{path}: arr_1 has shape {labels.shape} and type {labels.dtype}, "
                            f"not ({len(images)},) integers", "give the class of each image, or no arr_1")  # fmt: skip
        if len(labels) and not (-MOST_CLASSES < labels.min() and labels.max() < MOST_CLASSES):
            raise FileFault(f"{path}: arr_1 holds {labels.min()} to {labels.max()}, which are no classes",
                            "number the classes from 0")  # fmt: skip
        labels = labels.astype(np.int64)
    return images, labels


def _shown(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}×{pixels.shape[0]}"
