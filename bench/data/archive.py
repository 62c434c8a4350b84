"""Unpack an archive of images into a directory that --data takes."""

import lzma
import shutil
import tarfile
import zlib
from collections import Counter
from pathlib import Path

PARTS = ("train", "test")
BROKEN = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError)  # no archive, damaged, cut short


def unpack(archive: Path, out: Path) -> dict[str, int]:
    """Unpack a tar file of train/<class>/ and test/<class>/; return the images in each part.

    The directory appears when it is whole. Raises ValueError where it is there already, and for a
    file that is no such archive or that names places outside it.
    """
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already; remove it, or choose another directory")
    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(tmp, filter="data")
        found = Counter(p.relative_to(tmp).parts[0] for p in tmp.glob("*/*/*") if p.is_file())
        if not all(found[part] for part in PARTS):
            raise ValueError(
                f"{str(archive)!r} has no train/<class>/ and test/<class>/ with images"
            )
        tmp.rename(out)
    except BROKEN as e:
        raise ValueError(f"{str(archive)!r} cannot be unpacked: {e}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return {part: found[part] for part in PARTS}
