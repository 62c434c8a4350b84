"""Other people's image files: every mode is read as it was meant or refused by its path."""

import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from bench.data import datasets
from bench.data.datasets import load_data
from bench.data.images import listing, read_image

RNG = np.random.default_rng(0)
COLOURS = np.kron(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
RGB = Image.fromarray(COLOURS)


def pixels(path) -> np.ndarray:
    return np.asarray(read_image(str(path))).astype(int)


def png(path, array: np.ndarray, colour: int, extra: bytes = b"") -> None:
    """Write (H, W[, C]) uint16 as a PNG of 16 bits a channel; colour: PNG's colour type."""
    h, w = array.shape[:2]

    def chunk(name: bytes, body: bytes) -> bytes:
        checked = name + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + extra + body)


# ---- modes


@pytest.mark.parametrize("mode, suffix", [
    ("1", "png"), ("1", "bmp"), ("L", "png"), ("L", "pgm"), ("LA", "png"), ("P", "png"),
    ("P", "gif"), ("P", "bmp"), ("PA", "tif"), ("RGB", "png"), ("RGB", "ppm"), ("RGB", "tif"),
    ("RGB", "jp2"), ("RGBA", "png"), ("RGBA", "tif"), ("CMYK", "tif"), ("YCbCr", "tif"),
])  # fmt: skip
def test_a_mode_without_loss_is_what_pillow_shows(mode, suffix, tmp_path):
    image = RGB.convert("L").convert(mode) if mode in ("LA", "PA") else RGB.convert(mode)
    image.save(tmp_path / f"image.{suffix}")
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels(tmp_path / f"image.{suffix}") - expected).max() <= (mode == "YCbCr")


def test_lab_is_turned_back_into_colours(tmp_path):
    Image.new("LAB", (8, 8), (138, 208, 195)).save(tmp_path / "lab.tif")  # L 54, a 80, b 67: red
    assert np.abs(pixels(tmp_path / "lab.tif")[0, 0] - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("quality", [95])
def test_cmyk_jpegs_are_not_inverted(quality, tmp_path):
    RGB.convert("CMYK").save(tmp_path / "image.jpg", quality=quality, subsampling=0)
    assert np.abs(pixels(tmp_path / "image.jpg") - COLOURS).mean() < 6


def test_16_bits_of_grey_are_scaled(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(ramp / 257)
    Image.fromarray(ramp).save(tmp_path / "little.png")
    Image.fromarray(ramp).save(tmp_path / "little.tif")
    Image.fromarray(ramp.astype(">u2")).save(tmp_path / "big.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "image.pgm")
    (tmp_path / "12-bit.pgm").write_bytes(
        b"P5 256 16 4095\n" + np.arange(4096).astype(">u2").tobytes())
    assert Image.open(tmp_path / "big.tif").mode == "I;16B"
    for name in ("little.png", "little.tif", "big.tif", "image.pgm"):
        found = pixels(tmp_path / name)
        assert (found == expected[..., None]).all(), name
    twelve = np.rint(np.arange(4096) * 255 / 4095).reshape(16, 256, 1)
    assert np.abs(pixels(tmp_path / "12-bit.pgm") - twelve).max() <= 1
    dark = np.full((8, 8), 300, np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert (pixels(tmp_path / "dark.png") == 1).all(), "300 of 65535 is nearly black"


def test_16_bits_of_colour_are_within_a_level(tmp_path):
    wide = RNG.integers(0, 65536, (16, 16, 3)).astype(np.uint16)
    png(tmp_path / "rgb.png", wide, 2)
    assert np.abs(pixels(tmp_path / "rgb.png") - wide / 257).max() < 1
    opaque = np.concatenate([wide, np.full((16, 16, 1), 65535, np.uint16)], 2)
    png(tmp_path / "rgba.png", opaque, 6)
    assert np.abs(pixels(tmp_path / "rgba.png") - wide / 257).max() < 1
    png(tmp_path / "la.png", opaque[..., 2:], 4)
    assert np.abs(pixels(tmp_path / "la.png") - wide[..., 2:] / 257).max() < 1


def test_a_12_bit_tiff_is_not_dark(tmp_path):
    values = np.arange(4096, dtype=np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    body, entries = packed.tobytes(), [
        (256, 4, 64), (257, 4, 64), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8),
        (277, 3, 1), (278, 4, 64), (279, 4, len(packed.tobytes())),
    ]  # fmt: skip
    at = 8 + len(body)
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    (tmp_path / "image.tif").write_bytes(
        b"II*\0" + struct.pack("<I", at) + body + directory + struct.pack("<I", 0))
    expected = np.rint(values * (255 / 4095)).reshape(64, 64, 1)
    assert np.abs(pixels(tmp_path / "image.tif") - expected).max() == 0


def float_tiff(path):
    Image.fromarray(RNG.random((8, 8)).astype(np.float32)).save(path)


def integer_tiff(path):
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(path)


def inverted_tiff(path):
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(path, tiffinfo={262: 0})


def transparent(mode):
    def make(path):
        image = RGB.convert("RGBA")
        image.putpixel((3, 3), (1, 2, 3, 200))
        image.convert(mode).save(path)

    return make


def transparent_palette(path):
    RGB.convert("P").save(path, transparency=RGB.convert("P").getpixel((0, 0)))


def transparent_colour(path):
    RGB.save(path, transparency=RGB.getpixel((0, 0)))


def transparent_deep_grey(path):
    values = np.full((8, 8), 700, np.uint16)
    body = struct.pack(">H", 700)
    extra = struct.pack(">I", 2) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    png(path, values, 0, extra)


def frames(path):
    others = [Image.new("RGB", RGB.size, colour) for colour in ("red", "blue")]
    RGB.save(path, save_all=True, append_images=others)


@pytest.mark.parametrize("name, make, said", [
    ("f.tif", float_tiff, "mode F"), ("i.tif", integer_tiff, "mode I"),
    ("0.tif", inverted_tiff, "0 is white"),
    ("a.png", transparent("RGBA"), "transparent"), ("a.webp", transparent("RGBA"), "transparent"),
    ("a.png", transparent("LA"), "transparent"), ("a.gif", transparent_palette, "transparent"),
    ("a.png", transparent_palette, "transparent"), ("a.png", transparent_colour, "transparent"),
    ("a.png", transparent_deep_grey, "transparent"),
    ("a.gif", frames, "3 frames"), ("a.png", frames, "3 frames"), ("a.webp", frames, "3 frames"),
    ("a.tif", frames, "3 frames"),
])  # fmt: skip
def test_what_has_no_one_meaning_is_refused_by_its_path(name, make, said, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=said) as error:
        read_image(str(tmp_path / name))
    assert repr(str(tmp_path / name)) in str(error.value) and "\n" not in str(error.value)


def test_alpha_that_hides_nothing_and_a_cameras_preview_are_no_reason(tmp_path):
    RGB.convert("RGBA").save(tmp_path / "opaque.png")
    RGB.convert("P").save(tmp_path / "unused.gif", transparency=255)
    RGB.save(tmp_path / "still.gif", save_all=True)
    RGB.save(tmp_path / "phone.jpg", format="MPO", save_all=True, quality=95, subsampling=0,
             append_images=[Image.new("RGB", (8, 8))])  # fmt: skip
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    assert (pixels(tmp_path / "opaque.png") == COLOURS).all()
    assert np.abs(pixels(tmp_path / "phone.jpg") - COLOURS).mean() < 5
    for name in ("unused.gif", "still.gif"):
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert (pixels(tmp_path / name) == expected).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation, suffix, tmp_path):
    """A camera that is held sideways writes the pixels as they come, and how to turn them."""
    bright = np.zeros((32, 48, 3), np.uint8)
    bright[:16, :16] = 255  # the corner that is at the upper left in the file
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(bright).save(tmp_path / f"image.{suffix}", exif=exif)
    found = pixels(tmp_path / f"image.{suffix}").mean(2)
    assert found.shape == ((32, 48) if orientation < 5 else (48, 32))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1),
              8: (-1, 0)}[orientation]  # fmt: skip
    assert found[corner] > 200 and (found > 128).sum() == pytest.approx(256, abs=40)


# ---- damage


def test_damage_is_one_sentence_with_the_path(tmp_path):
    """Cut, flipped and zeroed at random places; a PNG's checksums let no other pixels through."""
    rng, files = random.Random(0), {}
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        path = tmp_path / f"image.{suffix}"
        RGB.save(path)
        files[suffix] = path.read_bytes()
    refused = 0
    for i in range(400):
        suffix = rng.choice(list(files))
        data, path = bytearray(files[suffix]), tmp_path / f"damaged.{suffix}"
        where = rng.randrange(len(data))
        match i % 3:
            case 0:
                data = data[:where]
            case 1:
                data[where] ^= 1 << rng.randrange(8)
            case 2:
                data[where : where + 50] = bytes(len(data[where : where + 50]))
        path.write_bytes(data)
        try:
            with warnings.catch_warnings(action="ignore"):
                found = pixels(path)
        except ValueError as e:
            assert repr(str(path)) in str(e) and "\n" not in str(e) and "BytesIO" not in str(e)
            refused += 1
        else:
            assert i % 3 or suffix in ("png", "jpg"), "a cut file was read"
            assert suffix != "png" or (found == COLOURS).all()
    assert refused > 150


def text_chunk(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    RGB.save(path, pnginfo=info)


def checksum(path):
    RGB.save(path)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


def bomb(path):
    Image.new("1", (20000, 20000)).save(path)


def lost_tail(path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG", quality=95)
    path.write_bytes(path.read_bytes()[:-1000] + bytes(1000))
    assert Image.open(path).convert("RGB").size == (64, 64), "Pillow reads it"


@pytest.mark.parametrize("make", [text_chunk, checksum, bomb, lost_tail,
                                  lambda path: path.mkdir(), lambda path: path.write_bytes(b""),
                                  lambda path: path.symlink_to("nowhere.png"),
                                  lambda path: path.write_text("<svg/>")])  # fmt: skip
def test_every_reader_names_the_file(make, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for i in range(6):
            RGB.save(tmp_path / name / f"{i}.png")
    bad = tmp_path / "y" / "6.png"
    make(bad)
    with pytest.raises(ValueError) as error:
        read_image(str(bad))
    assert repr(str(bad)) in str(error.value) and "\n" not in str(error.value)
    if not bad.is_dir():
        with pytest.raises(ValueError, match="6.png"):
            load_data(str(tmp_path), 0.2, 0)
        with pytest.raises(ValueError, match="6.png"):
            data = load_data(str(tmp_path), 0.2, 0, image_size=16, lazily=True, workers=0)
            for split in (data.train, data.val, data.test):
                split.batch(slice(None))


# ---- directories


def folder_of(root, classes=("x", "y"), number=6):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(number):
            pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    root = folder_of(tmp_path / "clean")
    data = load_data(str(root), 0.2, 0)
    for name in (".ipynb_checkpoints", "__MACOSX", ".git", "Thumbs.db", "__pycache__", "@eaDir"):
        (root / name).mkdir()
        RGB.save(root / name / "0-checkpoint.png")
        (root / "x" / name).mkdir()
        RGB.save(root / "x" / name / "0-checkpoint.png")
    for name in ("._0.png", ".0.png.swp", "Thumbs.db", "labels.txt"):
        if not (root / "x" / name).exists():
            (root / "x" / name).write_bytes(b"no image")
    (root / "readme.txt").write_text("what this is")
    again = load_data(str(root), 0.2, 0)
    assert again.classes == data.classes == ["x", "y"] and again.fingerprint == data.fingerprint
    lazily = load_data(str(root), 0.2, 0, image_size=8, lazily=True)
    assert len(lazily.train) + len(lazily.val) + len(lazily.test) == 12


def test_files_are_in_torchvisions_order_at_any_depth(tmp_path):
    from torchvision.datasets import ImageFolder

    root = folder_of(tmp_path / "images", ("b", "a", "C"), 3)
    for below in ("b/z/q", "b/a", "a/10", "a/9"):
        (root / below).mkdir(parents=True)
        RGB.save(root / below / "UPPER.PNG")
        RGB.save(root / below / "1.jpeg")
    theirs = ImageFolder(str(root))
    assert listing(root) == ([p for p, _ in theirs.samples], theirs.targets, theirs.classes)


def test_images_that_torchvision_leaves_out_are_read(tmp_path):
    root = folder_of(tmp_path / "images")
    for suffix in ("gif", "jfif", "jp2", "avif"):
        try:
            RGB.resize((8, 8)).save(root / "x" / f"more.{suffix}")
        except (KeyError, OSError):
            continue  # this Pillow was built without it
    files = list((root / "x").iterdir())
    assert len(load_data(str(root), 0, 0).train) + len(load_data(str(root), 0, 0).test) == (
        6 + len(files))  # fmt: skip


@pytest.mark.parametrize("suffix", ["heic", "svg", "JXL", "exr"])
def test_images_that_cannot_be_read_here_are_not_left_out(suffix, tmp_path):
    root = folder_of(tmp_path / "images")
    (root / "x" / f"more.{suffix}").write_bytes(b"an image of another kind")
    with pytest.raises(ValueError, match=f"more.{suffix}"):
        load_data(str(root), 0, 0)


def test_names_that_are_no_text(tmp_path):
    root = folder_of(tmp_path / "images")
    os.rename(root / "x" / "0.png", os.fsencode(root / "x") + b"/\xff.png")
    for lazily in (False, True):
        data = load_data(str(root), 0, 0, image_size=8, lazily=lazily)
        assert len(data.train) + len(data.test) == 12


def test_links_to_nothing_are_named(tmp_path):
    root = folder_of(tmp_path / "images")
    (root / "z").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="images/z"):
        load_data(str(root), 0, 0)


def test_links_in_a_circle_are_named(tmp_path):
    root = folder_of(tmp_path / "images")
    (root / "x" / "again").symlink_to(root, target_is_directory=True)
    with pytest.raises(ValueError, match="again"):
        load_data(str(root), 0, 0)


def test_links_in_a_circle_of_several_are_named(tmp_path):
    """Each points beside itself: followed, a class of six images has hundreds."""
    root = folder_of(tmp_path / "images", ("x", "y", "z"))
    for name, other in (("x", "y"), ("y", "z"), ("z", "x")):
        (root / name / f"to-{other}").symlink_to(f"../{other}", target_is_directory=True)
    for lazily in (False, True):
        with pytest.raises(ValueError, match="images/x/to-y/to-z/to-x.*lies in"):
            load_data(str(root), 0, 0, image_size=8, lazily=lazily)
    (root / "z" / "to-x").unlink()
    assert len(listing(root)[0]) == 6 * (3 + 2 + 1), "links that end somewhere are followed"


@pytest.mark.parametrize("lazily", [False, True])
def test_training_images_among_the_test_images_are_told(lazily, tmp_path, recwarn):
    for part, number in (("train", 6), ("test", 3)):
        folder_of(tmp_path / "images" / part, number=number)
    root = tmp_path / "images"
    load_data(str(root), 0, 0, lazily=lazily)
    assert not recwarn.list
    (root / "test/x/more").symlink_to("../../train/x")
    if not lazily:  # copies, of which photographs that are read later know nothing
        (root / "test/y/copy.png").write_bytes((root / "train/y/0.png").read_bytes())
    with pytest.warns(UserWarning, match=f"{6 if lazily else 7} of .* test images .* training"):
        load_data(str(root), 0, 0, lazily=lazily)


def test_other_test_images_that_were_trained_on_are_told(tmp_path, recwarn):
    root = folder_of(tmp_path / "images", number=10)
    data = load_data(str(root), 0.2, 0)
    datasets.test_images_of(str(root), data, None)
    assert not recwarn.list
    (root / "x" / "00.png").write_bytes((root / "x" / "0.png").read_bytes())
    with pytest.warns(UserWarning, match="of .* test images .* training images too"):
        datasets.test_images_of(str(root), data, None)


@pytest.mark.parametrize("parts", [("Train", "Test"), ("training", "validation")])
def test_parts_of_a_data_set_are_no_classes(parts, tmp_path):
    for part in parts:
        folder_of(tmp_path / part)
    with pytest.raises(ValueError, match="train/ and test/"):
        load_data(str(tmp_path), 0, 0)


def test_a_class_may_be_called_train(tmp_path):
    for part in ("train", "test"):
        folder_of(tmp_path / part, ("car", "train"))
    assert load_data(str(tmp_path), 0.2, 0).classes == ["car", "train"]


@pytest.mark.parametrize("lazily", [False, True])
def test_a_class_of_one_image_is_named(lazily, tmp_path):
    root = folder_of(tmp_path / "images", ("x", "y", "z"), 6)
    for i in range(1, 6):
        (root / "y" / f"{i}.png").unlink()
    with pytest.raises(ValueError, match="only one image is in 'y'") as error:
        load_data(str(root), 0, 0, lazily=lazily)
    assert "images/train/<class>/" in str(error.value) and "--val" not in str(error.value)
    both = tmp_path / "both"
    root.rename(both.with_name("one"))
    both.mkdir()
    (tmp_path / "one").rename(both / "train")
    folder_of(both / "test", ("x", "y", "z"), 2)
    assert load_data(str(both), 0, 0, lazily=lazily).train.labels.bincount().tolist() == [6, 1, 6]
    with pytest.raises(ValueError, match="'y'; add images of it, or give another --val, or 0"):
        load_data(str(both), 0.2, 0, lazily=lazily)


def test_an_empty_class_is_named(tmp_path):
    root = folder_of(tmp_path / "images")
    (root / "z").mkdir()
    with pytest.raises(ValueError, match=r"\['z'\]"):
        load_data(str(root), 0, 0)


def test_changed_files_are_read_again_and_have_another_fingerprint(tmp_path):
    for part, number in (("train", 6), ("test", 3)):
        folder_of(tmp_path / part, number=number)
    first = load_data(str(tmp_path), 0, 0)
    (tmp_path / "test/x/9.png").write_bytes((tmp_path / "train/x/0.png").read_bytes())
    second = load_data(str(tmp_path), 0, 0)
    assert second.fingerprint == first.fingerprint
    assert second.test_fingerprint != first.test_fingerprint and len(second.test) == 7
    assert torch.equal(first.train.images, second.train.images)
    lazily = [load_data(str(tmp_path), 0, 0, lazily=True).test_fingerprint]
    (tmp_path / "test/x/9.png").unlink()
    lazily.append(load_data(str(tmp_path), 0, 0, lazily=True).test_fingerprint)
    assert len(set(lazily)) == 2
