"""Directories of images by class: which files they hold, and a file's pixels as RGB.

What cannot be read as it was meant (damage, animation, transparency, values without a known black
and white) is refused by the file's path.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

NO_CLASSES = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information",
              "lost+found", "Thumbs.db"}  # fmt: skip
# Beside torchvision's: what is an image by its name is read or refused, never left out.
MORE = (".gif", ".apng", ".jpe", ".jfif", ".jp2", ".j2k", ".jpf", ".jxl", ".avif", ".heic", ".heif",
        ".pbm", ".pnm", ".pfm", ".dib", ".ico", ".tga", ".pcx", ".sgi", ".dds", ".qoi", ".psd",
        ".svg", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".nef", ".dcm")  # fmt: skip
SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"}
SEVERAL_IN_ONE = {"MPO", "PSD"}  # a camera's previews, a drawing's layers: the first is the image


# ---- files


def is_clutter(name: str) -> bool:
    """Whether a file or folder is an operating system's or an editor's, and no image or class."""
    return name.startswith(".") or name in NO_CLASSES


def is_image(name: str) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS  # seconds, and not all read images

    return name.lower().endswith((*IMG_EXTENSIONS, *MORE))


def classes_in(root: Path) -> list[str]:
    """Return the names of the folders that are classes. Raises ValueError where several look like
    the parts of a data set; one alone may be a class, as "train" is of CIFAR-100."""
    entries = [e for e in os.scandir(root) if not is_clutter(e.name)]
    if lost := [e.path for e in entries if e.is_symlink() and not os.path.exists(e.path)]:
        raise ValueError(f"{lost[0]!r} is a link to nothing; restore what it meant, or remove it")
    names = sorted(e.name for e in entries if e.is_dir())
    parts = [name for name in names if name.lower() in SPLITS]
    if len(parts) > 1:
        raise ValueError(
            f"{str(root)!r} has the folders {parts}, which would be classes here; name the parts "
            "of a data set train/ and test/ (or val/)"
        )
    return names


def files_in(folder: Path) -> Iterator[str]:
    """Yield the images at any depth, as torchvision's ImageFolder orders them."""
    walk = ((top, below, names) for top, below, names in walked(folder))
    for top, _, names in sorted(walk, key=lambda item: item[0]):
        yield from (os.path.join(top, n) for n in sorted(names)
                    if is_image(n) and not is_clutter(n))  # fmt: skip


def walked(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk through links, without clutter. Raises ValueError for a link to a folder around it,
    be it by other links, and OSError for a folder that cannot be read."""

    def refuse(e: OSError) -> None:
        raise e

    for top, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        below[:] = sorted(name for name in below if not is_clutter(name))
        links = [path for name in below if (path := Path(top, name)).is_symlink()]
        around = [Path(top), *Path(top).parents] if links else []
        around = {place for p in around for place in (p.resolve(), *p.resolve().parents)}
        for path in links:
            if path.resolve() in around:
                raise ValueError(f"{str(path)!r} links to a folder that it lies in; remove it")
        yield top, below, names


def listing(root: Path) -> tuple[list[str], list[int], list[str]]:
    """Return the paths of the images in <class>/* under root, their labels, and the classes.

    Hidden folders and files are left out. Raises ValueError where there are none, or none of a
    class.
    """
    classes = classes_in(root)
    by_class = [list(files_in(root / name)) for name in classes]
    if not any(by_class):
        raise ValueError(
            f"no images in folders by class under {str(root)!r}; put each into the folder of its "
            "class there"
        )
    if empty := [name for name, paths in zip(classes, by_class, strict=True) if not paths]:
        raise ValueError(
            f"no images in the folders {empty} of {str(root)!r}; add some, or remove the folders"
        )
    if lost := [path for paths in by_class for path in paths if not os.path.isfile(path)]:
        raise ValueError(
            f"cannot read the image {lost[0]!r} (no file, or a link to none); remove it"
        )
    labels = [label for label, paths in enumerate(by_class) for _ in paths]
    return [path for paths in by_class for path in paths], labels, classes


def state_of(root: Path) -> str:
    """Return what changes when files below a directory do: names, sizes and times; "" for none."""
    digest = hashlib.sha256()
    for top, _, names in walked(root) if root.is_dir() else ():
        for name in sorted(names):
            path = os.path.join(top, name)
            found = os.stat(path) if os.path.exists(path) else os.lstat(path)
            digest.update(os.fsencode(path))
            digest.update(f" {found.st_size} {found.st_mtime_ns} {found.st_ino}\n".encode())
    return digest.hexdigest() if root.is_dir() else ""


# ---- pixels


def read_image(path: str) -> Image.Image:
    """Return a file's image as RGB, upright as its camera says. Raises ValueError with the path."""
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # the checksums of a PNG; ends the use of the object
        with Image.open(io.BytesIO(data)) as image:
            refuse_lost_end(image, data)
            return as_rgb(single(image))
    except Exception as e:  # a decoder meets other people's bytes, and raises whatever it likes
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        if isinstance(e, UnidentifiedImageError):
            reason = "no format that Pillow knows, or its beginning is damaged"
        raise ValueError(
            f"cannot read the image {path!r} ({reason}); replace or remove it"
        ) from e


def refuse_lost_end(image: Image.Image, data: bytes) -> None:
    """Raise ValueError for a JPEG whose end was never written, which Pillow fills with grey."""
    kept = data.rstrip(b"\0")
    lost = len(data) - len(kept)
    if image.format in ("JPEG", "MPO") and lost >= 64 and not kept.endswith(b"\xff\xd9"):
        raise ValueError(f"its last {lost} bytes are zeros, and the image does not end before them")


def single(image: Image.Image) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in SEVERAL_IN_ONE:
        raise ValueError(f"it has {frames} frames or pages; keep one of them")
    return image


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as 8-bit RGB. Raises ValueError where that is not defined."""
    image.load()
    if image.mode.startswith(("I", "F")):
        image = from_16_bits(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise ValueError(
                "it is transparent in places, and what shines through is not known; flatten it "
                "onto a background"
            )
    return image.convert("RGB")


def from_16_bits(image: Image.Image) -> Image.Image:
    """Return grey of 16 bits (or what a TIFF says) as grey of 8, rounded. Raises ValueError for
    floats, 32 bits, and TIFFs whose 0 is white, which Pillow does not turn."""
    tags = getattr(image, "tag_v2", {})
    bits, white_is_0 = tags.get(258, (16,))[0], tags.get(262) == 0
    known = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if not known or white_is_0:
        raise ValueError(
            f"{image.format} of mode {image.mode}{', 0 is white,' * white_is_0} has no known black "
            "and white; save it with 8 bits a channel"
        )
    values = np.asarray(image).astype(np.int64)
    if (np.equal(values, image.info.get("transparency", -1))).any():
        raise ValueError("it is transparent in places; flatten it onto a background")
    grey = Image.fromarray(np.rint(values * (255 / (2**bits - 1))).astype(np.uint8))
    grey.info, grey.format = image.info, image.format
    return grey
