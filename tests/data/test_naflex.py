"""NaFlex's transform against transformers' processor of SigLIP 2, bit for bit."""

from __future__ import annotations

import io
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from samples import wavy_picture as picture

import clipfast
from clipfast.data.naflex import patch_grid
from clipfast.data.transform import ImageError, load_image, ready_to_resize

MODES = ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1", "I;16"]
SIZES = [(1, 1), (1, 2000), (2000, 1), (3, 2), (31, 33), (500, 41), (640, 427), (256, 256), (1024, 40), (1999, 1501)]


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("transformers")
    from transformers.models.siglip2 import image_processing_pil_siglip2

    return image_processing_pil_siglip2


def processed(theirs, image: Image.Image, max_patches: int, patch_size: int = 16, **options) -> dict:
    processor = theirs.Siglip2ImageProcessorPil(
        do_convert_rgb=True, max_num_patches=max_patches, patch_size=patch_size, **options
    )
    return processor([image], return_tensors="pt")


def in_their_order(patches: torch.Tensor) -> torch.Tensor:
    return patches.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)


# --- the same numbers -------------------------------------------------------------------------------------


def test_every_size_gets_the_grid_that_transformers_gives_it(theirs):
    rng = np.random.default_rng(0)
    # uniform in the logarithm: tiny, huge and extreme ones alike
    sizes = [tuple(map(int, np.exp(rng.uniform(0, np.log(40_000), 2)))) for _ in range(400)]
    sizes += [(1, 1), (1, 2000), (2000, 1), (1, 10**6), (16, 16), (256, 256), (255, 257), (4096, 16), (30_000, 20_000)]
    sizes += [(224 + i, 300) for i in range(40)]
    for height, width in sizes:
        for budget, patch in ((1, 16), (2, 14), (3, 16), (64, 16), (256, 16), (729, 14), (1024, 16)):
            expected = theirs.get_image_size_for_max_num_patches(height, width, patch, budget)
            rows, columns = patch_grid(height, width, budget, patch)
            assert (rows * patch, columns * patch) == expected, (height, width, budget, patch)
            assert rows * columns <= budget


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("max_patches", [1, 3, 40, 256])
def test_values_are_bitwise_transformers(theirs, size, max_patches):
    image = picture(size)
    patches, grid = clipfast.naflex_transform(max_patches)(image)
    expected = processed(theirs, image, max_patches)
    assert list(grid) == expected["spatial_shapes"][0].tolist()
    count = math.prod(grid)
    assert patches.dtype == torch.float32
    assert patches.shape == (count, 768)
    assert patches.is_contiguous()
    assert torch.equal(in_their_order(patches), expected["pixel_values"][0, :count])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(theirs, mode):
    image = picture((97, 140), mode)
    patches, grid = clipfast.naflex_transform(30, 14)(image)
    # the one mode where PIL's conversion to RGB is not what is wanted: deep grey is scaled first
    shown = ready_to_resize(image, 10**6) if mode == "I;16" else image
    expected = processed(theirs, shown, 30, 14)
    assert torch.equal(in_their_order(patches), expected["pixel_values"][0, : math.prod(grid)])
    assert patches.std() > 0.1


def test_own_mean_and_std(theirs):
    image, mean, std = picture((60, 33)), (0.1, 0.5, 0.3), (0.2, 0.7, 1.5)
    patches, grid = clipfast.naflex_transform(16, mean=mean, std=std)(image)
    expected = processed(theirs, image, 16, image_mean=list(mean), image_std=list(std))
    assert torch.equal(in_their_order(patches), expected["pixel_values"][0, : math.prod(grid)])


def test_a_batch_is_transformers_without_its_padding(theirs):
    images = [picture(size, seed=i) for i, size in enumerate(SIZES)]
    transform = clipfast.naflex_transform(40)
    ours = clipfast.NaFlexBatch.of(map(transform, images))
    processor = theirs.Siglip2ImageProcessorPil(do_convert_rgb=True, max_num_patches=40)
    same = clipfast.NaFlexBatch.from_padded(**processor(images, return_tensors="pt"))
    assert torch.equal(ours.grids, same.grids)
    assert torch.equal(ours.patches, same.patches)
    assert len(ours) == len(SIZES)


# --- training ---------------------------------------------------------------------------------------------


def test_training_takes_a_random_part_of_the_pictures_own_shape():
    image = picture((300, 100))
    transform = clipfast.naflex_transform(64, train=True, scale=(0.4, 0.6), ratio=(0.9, 1.1))
    grids, values = set(), []
    for seed in range(20):
        patches, grid = transform(image, torch.Generator().manual_seed(seed))
        again, _ = transform(image, torch.Generator().manual_seed(seed))
        assert torch.equal(patches, again)
        assert 32 < math.prod(grid) <= 64
        # three times as wide as high, give or take a tenth and a rounding up to whole patches
        assert 2 < grid[1] / grid[0] < 4
        grids.add(grid)
        values.append(patches.mean().item())
    assert len(set(values)) == 20
    assert clipfast.naflex_transform(64)(image).grid == (4, 12)
    # the whole picture where no other part is allowed
    whole = clipfast.naflex_transform(64, train=True, scale=(1, 1), ratio=(1, 1))(image).patches
    assert torch.equal(whole, clipfast.naflex_transform(64)(image).patches)


def test_it_leaves_the_picture_and_torchs_state_alone():
    image = picture((50, 40), "P")
    before, state = image.tobytes(), torch.get_rng_state()
    transform = clipfast.naflex_transform(9, train=True)
    transform(image, torch.Generator().manual_seed(0))
    assert (image.mode, image.tobytes()) == ("P", before)
    assert torch.equal(torch.get_rng_state(), state)
    copy = pickle.loads(pickle.dumps(transform))
    assert copy == transform
    assert "max_patches=9" in repr(copy)


def test_defaults_of_the_process_change_nothing():
    image, transform = picture((50, 40)), clipfast.naflex_transform(9)
    expected = transform(image).patches
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        assert torch.equal(transform(image).patches, expected)
        assert clipfast.NaFlexBatch.of([transform(image), transform.blank()]).grids.tolist() == [[3, 3], [1, 1]]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_orientation_is_applied_where_that_is_asked_for():
    upright = picture((60, 20))
    stored, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif)
    stored = load_image(stream.getvalue())
    assert clipfast.naflex_transform(12)(stored).grid == (6, 2)
    turned = clipfast.naflex_transform(12, apply_orientation=True)(stored)
    assert torch.equal(turned.patches, clipfast.naflex_transform(12)(upright).patches)


# --- what is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_patches": 0}, "max_patches must be a positive int, got 0"),
        ({"max_patches": 25.0}, "max_patches must be a positive int, got 25.0"),
        ({"max_patches": True}, "max_patches must be a positive int, got True"),
        ({"patch_size": -1}, "patch_size must be a positive int, got -1"),
        ({"std": (1, 1)}, "std must be 3 positive numbers"),
        ({"scale": (0, 1)}, "scale must be 2 positive numbers"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        clipfast.naflex_transform(**arguments)


def test_pictures_that_cannot_be_used():
    transform = clipfast.naflex_transform(16, max_pixels=199)
    with pytest.raises(ImageError, match="too large: 20 × 10 = 200 pixels, max_pixels=199"):
        transform(Image.new("RGB", (20, 10)))
    stream = io.BytesIO()
    picture((100, 100)).save(stream, "PNG")
    with pytest.raises(ImageError, match="truncated"):
        clipfast.naflex_transform(16)(Image.open(io.BytesIO(stream.getvalue()[:2000])))
    with pytest.raises(TypeError, match=r"PIL.Image.Image .*got ndarray of shape \(4, 4, 3\)"):
        transform(np.zeros((4, 4, 3)))
