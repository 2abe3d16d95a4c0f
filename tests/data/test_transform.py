"""The image transform against open_clip's, bit for bit, and a clear error for every picture that is none."""

from __future__ import annotations

import io
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from samples import wavy_picture as picture

import clipfast
from clipfast.data import transform as module
from clipfast.data.transform import ImageError, load_image, to_pixels

MODES = ["RGB", "L", "P", "RGBA", "CMYK", "LA", "PA", "I;16", "I", "F", "1", "YCbCr", "HSV", "LAB"]
SIZES = [(1, 1), (1, 7), (3, 2), (31, 33), (32, 32), (33, 200), (500, 41), (224, 223), (640, 427), (1024, 40)]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("open_clip").transform.image_transform


# --- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("image_size", [32, 224, (48, 96), (97, 31)], ids=str)
def test_evaluation_is_bitwise_open_clips(theirs, size, image_size):
    image = picture(size)
    ours = clipfast.image_transform(image_size)(image)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert ours.shape == (3, height, width)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, theirs(image_size, is_train=False)(image))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [32, (48, 96)], ids=str)
def test_other_ways_to_resize_are_open_clips(theirs, resize_mode, interpolation, image_size):
    how = {"resize_mode": resize_mode, "interpolation": interpolation}
    if resize_mode == "longest":
        how["fill_color"] = 77
    elif resize_mode == "shortest" and not isinstance(image_size, int) and interpolation != "bicubic":
        pytest.skip("open_clip takes the bicubic one here whatever is asked for")
    for size in [(1, 7), (31, 33), (500, 41), (97, 140), (96, 48)]:
        for mode in ("RGB", "L", "RGBA", "P"):
            image = picture(size, mode)
            expected = theirs(image_size, is_train=False, **how)(image)
            assert torch.equal(clipfast.image_transform(image_size, **how)(image), expected), (size, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(5, 3), (97, 140)], ids=str)
def test_every_mode(theirs, mode, size):
    image = picture(size, mode)
    assert image.mode == mode
    # the one mode where ours differs unless it is asked not to
    options = {"as_open_clip": True} if mode == "I;16" else {}
    assert torch.equal(clipfast.image_transform(64, **options)(image), theirs(64, is_train=False)(image))
    torch.manual_seed(3)
    expected = theirs(64, is_train=True)(image)
    torch.manual_seed(3)
    assert torch.equal(clipfast.image_transform(64, train=True, **options)(image), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_files_opened_and_not_yet_read(theirs, kind):
    data = encoded(picture((120, 90), "P" if kind == "GIF" else "RGB"), kind)
    expected = theirs(56, is_train=False)(Image.open(io.BytesIO(data)))
    assert torch.equal(clipfast.image_transform(56)(Image.open(io.BytesIO(data))), expected)
    assert torch.equal(clipfast.image_transform(56)(load_image(data)), expected)


def test_own_mean_and_std(theirs):
    image, mean, std = picture((50, 60)), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    ours = clipfast.image_transform(32, mean=mean, std=std)(image)
    assert torch.equal(ours, theirs(32, is_train=False, mean=mean, std=std)(image))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("image_size", [32, (40, 24)], ids=str)
def test_one_seed_gives_one_crop(theirs, size, image_size):
    image = picture(size)
    ours, reference = clipfast.image_transform(image_size, train=True), theirs(image_size, is_train=True)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = reference(image), torch.rand(1)
        torch.manual_seed(seed)
        result = ours(image), torch.rand(1)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1]), "as many draws were taken from the generator"


@pytest.mark.parametrize("size", [(60, 40), (1, 300), (300, 1)], ids=str)
def test_wide_crops(theirs, size):
    """Parts down to a twentieth of the area, and pictures so narrow that ten draws do not fit."""
    image, scale = picture(size), (0.05, 1.0)
    reference = theirs(16, is_train=True, aug_cfg={"scale": scale})
    for seed in range(50):
        torch.manual_seed(seed)
        expected = reference(image)
        torch.manual_seed(seed)
        assert torch.equal(clipfast.image_transform(16, train=True, scale=scale)(image), expected)


def test_ratio_bounds_the_shape_of_a_crop():
    for seed in range(200):
        torch.manual_seed(seed)
        left, top, width, height = module.random_part((400, 300), (0.2, 0.5), (1.9, 2.1))
        assert 0 <= left <= 400 - width
        assert 0 <= top <= 300 - height
        assert 1.85 < width / height < 2.15
        assert 0.19 < width * height / (400 * 300) < 0.51


def test_exif_orientation_is_left_alone(theirs):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = encoded(picture((80, 40)), "JPEG", exif=exif)
    assert load_image(data).size == (80, 40)
    expected = theirs(32, is_train=False)(Image.open(io.BytesIO(data)))
    assert torch.equal(clipfast.image_transform(32)(load_image(data)), expected)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied_where_that_is_asked_for(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image, kind in ((picture((80, 40)), "PNG"), (Image.fromarray(deep_pixels((40, 80))), "PNG")):
        stored = load_image(encoded(image, kind, exif=exif))
        upright = ImageOps.exif_transpose(stored)
        expected = clipfast.image_transform(32)(upright)
        assert torch.equal(clipfast.image_transform(32, apply_orientation=True)(stored), expected)
        # a crop is drawn in the picture as it is seen
        torch.manual_seed(0)
        expected = clipfast.image_transform(32, train=True)(upright)
        torch.manual_seed(0)
        assert torch.equal(clipfast.image_transform(32, train=True, apply_orientation=True)(stored), expected)


def test_a_damaged_exif_block_turns_nothing():
    data = encoded(picture((80, 40)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    image = load_image(data)
    expected = clipfast.image_transform(32)(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks
        assert torch.equal(clipfast.image_transform(32, apply_orientation=True)(image), expected)


# --- more than 8 bits -------------------------------------------------------------------------------------


def deep_pixels(shape: tuple[int, int], bits: int = 16) -> np.ndarray:
    """Grey of 8 bits, spread over more."""
    shallow = np.asarray(picture(shape[::-1], "L")).astype(np.int64)
    return np.round(shallow * ((1 << bits) - 1) / 255).astype(np.uint16)


def tiff(pixels: np.ndarray, order: str, bits: int, kind: int = 1) -> bytes:
    """A TIFF of one uncompressed strip; ``kind`` is 1 for unsigned, 2 for signed, 3 for floating."""
    (height, width), data = pixels.shape, pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    fields |= {279: len(data), 339: kind}
    longs = (273, 279)
    entries = b"".join(
        struct.pack(order + ("HHII" if n in longs else "HHIHxx"), n, 4 if n in longs else 3, 1, value)
        for n, value in sorted(fields.items())
    )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return start + data + struct.pack(order + "H", len(fields)) + entries + bytes(4)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("source", ["PNG", "TIFF", "JPEG2000", "PPM", "<", ">", "memory", "memory I", "I;16B"])
def test_grey_of_16_bits_is_scaled(source, train):
    pixels = deep_pixels((50, 60))
    image = Image.fromarray(pixels)
    if source in ("<", ">"):
        image = load_image(tiff(pixels, source, 16))
        assert image.mode == ("I;16" if source == "<" else "I;16B")
    elif source == "memory I":
        image = Image.fromarray(pixels.astype(np.int32))
        assert image.mode == "I"
    elif source == "I;16B":
        image = Image.frombytes("I;16B", (60, 50), pixels.astype(">u2").tobytes())
    elif source != "memory":
        image = load_image(encoded(image, source, **({"irreversible": False} if source == "JPEG2000" else {})))
    shallow = picture((60, 50), "L")
    torch.manual_seed(0)
    expected = clipfast.image_transform(32, train)(shallow)
    torch.manual_seed(0)
    assert torch.equal(clipfast.image_transform(32, train)(image), expected)


def test_a_dark_picture_of_16_bits_is_dark():
    dark = np.full((9, 9), 200, np.uint16)  # 200 of 65535
    for kind in ("PNG", "PPM"):
        image = load_image(encoded(Image.fromarray(dark), kind))
        assert to_pixels(clipfast.image_transform(8)(image)[None]).max() == 1
    # 8 bits in 32, as open_clip has them
    bright = Image.fromarray(dark.astype(np.int32))
    assert to_pixels(clipfast.image_transform(8)(bright)[None]).min() == 200


@pytest.mark.parametrize(("bits", "kind"), [(12, 1), (32, 1), (32, 2)])
def test_other_depths(bits, kind):
    shallow = picture((60, 50), "L")
    if bits == 12:
        image = Image.fromarray(deep_pixels((50, 60), 12))
        image.tag_v2 = {258: (12,)}  # as Pillow leaves a TIFF of 12 bits
    else:
        spread = np.round(np.asarray(shallow) * ((2**31 - 1) / 255)).astype(np.int32)
        image = load_image(tiff(spread, "<", 32, kind))
        assert image.mode == "I"
    assert torch.equal(clipfast.image_transform(32)(image), clipfast.image_transform(32)(shallow))


@pytest.mark.parametrize("source", ["PNG", "TIFF", "PPM", ">", "memory"])
def test_as_open_clip_deep_grey_is_cut_off(theirs, source):
    pixels = deep_pixels((50, 60))
    image = Image.fromarray(pixels)
    if source == ">":
        image = load_image(tiff(pixels, ">", 16))
    elif source != "memory":
        image = load_image(encoded(image, source))
    assert torch.equal(clipfast.image_transform(32, as_open_clip=True)(image), theirs(32, is_train=False)(image))


def test_colours_of_16_bits_are_scaled():
    """By Pillow, which keeps the high byte; nothing is left to do."""
    rows = b"".join(b"\0" + b"".join(struct.pack(">HHH", 0x8011, 0xFF22, 0x0033) for _ in range(4)) for _ in range(4))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    pixels = to_pixels(clipfast.image_transform(4)(load_image(data))[None])
    assert pixels[0, 0, 0].tolist() == [0x80, 0xFF, 0x00]


# --- without open_clip ------------------------------------------------------------------------------------


def test_to_pixels_undoes_the_normalisation():
    image = picture((48, 32))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    for pixels in (
        to_pixels(clipfast.image_transform((32, 48))(image)[None]),
        to_pixels(clipfast.image_transform((32, 48), mean=mean, std=std)(image)[None], mean, std),
    ):
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels[0].numpy(), np.asarray(image))


def test_to_pixels_wants_a_batch():
    with pytest.raises(ValueError, match=re.escape("images must be [B, 3, H, W], got [3, 8, 8]")):
        to_pixels(torch.zeros(3, 8, 8))


def test_picture_is_not_changed():
    image = picture((40, 30), "RGBA")
    before = image.tobytes()
    clipfast.image_transform(16)(image)
    clipfast.image_transform(16, train=True)(image)
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (40, 30), before)


def test_pickle_and_repr():
    transform = clipfast.image_transform(32, train=True, scale=(0.5, 1.0))
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    for option in ("image_size=(32, 32)", "train=True", "scale=(0.5, 1.0)"):
        assert option in repr(copy)


def test_other_default_dtype_and_no_torchvision():
    """Float32 whatever torch's default is; and the transform brings no torchvision with it."""
    script = (
        "import sys, torch, clipfast; from PIL import Image; torch.set_default_dtype(torch.float64);"
        "assert clipfast.image_transform(8)(Image.new('L', (9, 9))).dtype == torch.float32;"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- reading ----------------------------------------------------------------------------------------------


def test_sources(tmp_path):
    data = encoded(picture((20, 10)), "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with path.open("rb") as file:
        images = [load_image(path), load_image(str(path)), load_image(data), load_image(file)]
    path.unlink()  # decoded, all of them
    images.append(load_image(io.BytesIO(data)))
    assert len({image.tobytes() for image in images}) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated(kind, tmp_path):
    """Cut anywhere, a file gives an ImageError that names it, or (when the end was idle) the whole picture."""
    image = picture((64, 48))
    data = encoded(image, kind)
    whole = load_image(data).tobytes()
    path = tmp_path / "cut.picture"
    messages = []
    for end in range(0, len(data) - 1, max(1, len(data) // 60)):
        path.write_bytes(data[:end])
        try:
            result = load_image(path)
        except ImageError as error:
            messages.append(str(error))
        else:
            assert result.tobytes() == whole
            assert end > 0.97 * len(data)
    assert len(messages) > 50
    assert all(str(path) in message for message in messages)
    with pytest.raises(ImageError, match=r"given data .*truncated|given data .*corrupt|not a picture"):
        load_image(data[: len(data) // 2])


def test_truncated_names_kind_and_size():
    data = encoded(picture((64, 48)), "JPEG")[:700]
    message = r"^the given data \(JPEG of 64 × 48 pixels\) is truncated or corrupt: "
    with pytest.raises(ImageError, match=message):
        load_image(data)
    message = r"^the image \(JPEG of 64 × 48 pixels\) is truncated or corrupt: "
    for train in (False, True):
        with pytest.raises(ImageError, match=message):
            clipfast.image_transform(32, train)(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_corrupt(kind):
    """Bytes overwritten at random: an ImageError or a picture, never another error."""
    data = encoded(picture((64, 48)), kind)
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(150):
        spoilt = bytearray(data)
        for position in rng.integers(0, len(data) if rng.random() < 0.5 else 64, 8):
            spoilt[position] = rng.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            try:
                load_image(bytes(spoilt))
            except ImageError:
                failed += 1
    assert failed > 10


def test_corrupt_where_pillow_raises_no_oserror():
    with pytest.raises(ImageError, match=r"PPM of 2 × 2 pixels\) is truncated or corrupt: Channel value too large"):
        load_image(b"P2 2 2 255 1 2 999 4\n")


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"<html>404</html>", bytes(1000)], ids=["none", "text", "html", "0"]
)
def test_not_a_picture(data):
    message = f"the given data is not a picture in a format that Pillow reads ({len(data)} bytes)"
    with pytest.raises(ImageError, match=re.escape(message)):
        load_image(data)


def test_postscript_starts_no_program(monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: started.append(args))
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    with pytest.raises(ImageError, match="not a picture"):
        load_image(file.getvalue())
    assert not started


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its data holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\0\0IDAT5\xaf\x06\x1e"
    )


@pytest.mark.parametrize("size", [(10_000, 9_000), (20_000, 20_000), (2_000_000_000, 2_000_000_000)], ids=str)
def test_huge(size):
    """Above Pillow's limit for a warning and above that for its error: one error, and no warning."""
    width, height = size
    message = f"{width} × {height} = {width * height} pixels, max_pixels=89478485 are allowed"
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        with pytest.raises(ImageError, match=message):
            load_image(bomb(width, height))
    assert not leaked


def test_max_pixels():
    data = encoded(picture((20, 10)), "PNG")
    assert load_image(data, max_pixels=200).size == (20, 10)
    with pytest.raises(
        ImageError, match="the given data is too large: 20 × 10 = 200 pixels, max_pixels=199 are allowed"
    ):
        load_image(data, max_pixels=199)
    with pytest.raises(ImageError, match="the image is too large: 20 × 10 = 200 pixels, max_pixels=199 are allowed"):
        clipfast.image_transform(8, max_pixels=199)(load_image(data))


def test_too_narrow_for_the_centre():
    with pytest.raises(ImageError, match="too narrow: 1 × 2000 pixels become 224 × 448000 before"):
        clipfast.image_transform(224)(picture((1, 2000)))


def test_empty():
    with pytest.raises(ImageError, match="the image is empty: 0 × 5 pixels"):
        clipfast.image_transform(8)(Image.new("RGB", (0, 5)))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("source", [None, 3, io.StringIO("text"), np.zeros(3)], ids=lambda s: type(s).__name__)
def test_wrong_source(source):
    message = f"source must be a path, bytes or a binary file object, got {type(source).__name__}"
    with pytest.raises(TypeError, match=message):
        load_image(source)


@pytest.mark.parametrize(
    ("image", "came"),
    [
        (np.zeros((8, 9, 3)), "ndarray of shape (8, 9, 3)"),
        (torch.zeros(3, 8, 9), "Tensor of shape (3, 8, 9)"),
        ("cat.png", "str"),
        (None, "NoneType"),
    ],
    ids=["array", "tensor", "path", "none"],
)
def test_not_a_pil_image(image, came):
    with pytest.raises(TypeError, match=r"image must be a PIL.Image.Image .*" + re.escape(f"got {came}") + "$"):
        clipfast.image_transform(8)(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive int or a (height, width) of them, got 0"),
        ({"image_size": (8, -1)}, "got (8, -1)"),
        ({"image_size": (8, 8, 3)}, "got (8, 8, 3)"),
        ({"image_size": (8, 8.5)}, "got (8, 8.5)"),
        ({"image_size": 8, "mean": (0.5,)}, "mean must be 3 numbers, got (0.5,)"),
        ({"image_size": 8, "std": (0.5, 0.0, 1.0)}, "std must be 3 positive numbers, got (0.5, 0.0, 1.0)"),
        ({"image_size": 8, "scale": (0.0, 1.0)}, "scale must be 2 positive numbers, got (0.0, 1.0)"),
        ({"image_size": 8, "ratio": (1.0,)}, "ratio must be 2 positive numbers, got (1.0,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        clipfast.image_transform(**arguments)
