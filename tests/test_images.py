"""What `encode` accepts, what it makes of it, and what it refuses."""

import io
import re

import numpy as np
import pytest
import torch
from conftest import picture, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from tokenizer import ImageTokenizer
from tokenizer.images import nearest_multiples, pil_to_tensor, tensor_to_pil, to_batch

NOISE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)  # (H, W, C)


def prepared(images, channels: int = 3, factor: int = 2, resize: int | None = None) -> np.ndarray:
    """What the model gets, as 0..255 and (B, H, W, C)."""
    return (to_batch(images, channels, factor, resize) * 255).permute(0, 2, 3, 1).numpy()


def chw(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array).movedim(-1, -3)


# The same pixels in every kind.

ONE = {
    "PIL": Image.fromarray(NOISE),
    "list of PIL": [Image.fromarray(NOISE)],
    "array HWC": NOISE,
    "array BHWC": NOISE[None],
    "read-only array": np.asarray(Image.fromarray(NOISE)),
    "mirrored view": np.ascontiguousarray(NOISE[:, ::-1])[:, ::-1],
    "uint8 CHW": chw(NOISE),
    "uint8 BCHW": chw(NOISE[None]),
    "float32": chw(NOISE).float() / 255,
    "float64": chw(NOISE[None]).double() / 255,
    "channels last": (chw(NOISE[None]).float() / 255).contiguous(memory_format=torch.channels_last),
    "with a gradient": (chw(NOISE).float() / 255).requires_grad_(),
}


@pytest.mark.parametrize("kind", ONE)
def test_every_kind_gives_the_same_tokens_for_the_same_picture(tokenizer, kind):
    tokens = tokenizer.encode(ONE[kind])
    assert tokens.shape == (1, 10, 12)
    assert torch.equal(tokens, tokenizer.encode(chw(NOISE)))
    assert torch.equal(to_batch(ONE[kind], 3, 2, None), to_batch(chw(NOISE), 3, 2, None))


def test_every_kind_gives_the_same_tokens_for_the_same_batch(tokenizer):
    batch = np.stack([NOISE, NOISE[::-1], 255 - NOISE])
    kinds = [batch, chw(batch), chw(batch).float() / 255, [Image.fromarray(array) for array in batch]]
    first, *others = [tokenizer.encode(kind) for kind in kinds]
    assert first.shape == (3, 10, 12)
    assert first.unique().numel() > 3
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uint8_equals_float_over_255_to_the_token_for_all_256_values(tokenizer, dtype):
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)
    divided = values.to(dtype) / 255
    assert torch.equal(to_batch(values, 3, 2, None), to_batch(divided, 3, 2, None))
    assert torch.equal(tokenizer.encode(values), tokenizer.encode(divided))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pixels_are_taken_at_their_own_value(tokenizer, dtype):
    images = (chw(NOISE) / 255).to(dtype)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images.float()))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_models_take_every_kind_too(mode):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny_config(image_channels=1)).eval()
    grey = np.asarray(Image.fromarray(NOISE).convert("L"))
    kinds = [grey[..., None], grey[None, ..., None], torch.tensor(grey)[None], torch.tensor(grey)[None] / 255]
    expected = tokenizer.encode(Image.fromarray(NOISE).convert(mode))
    assert all(torch.equal(tokenizer.encode(kind), expected) for kind in kinds)


def test_what_was_passed_in_is_neither_changed_nor_shared():
    for images in (NOISE.copy(), chw(NOISE), torch.full((3, 8, 8), 1.0005)):
        before = images.copy() if isinstance(images, np.ndarray) else images.clone()
        to_batch(images, 3, 2, None).zero_()
        assert (images == before).all()


@settings(max_examples=60, deadline=None)
@given(
    overshoot=st.floats(0, 1e-3),
    side=st.sampled_from([-1, 1]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_an_overshoot_up_to_a_thousandth_is_clamped(overshoot, side, dtype):
    edge = 1.0 if side > 0 else 0.0
    images = torch.full((3, 4, 4), edge + side * overshoot, dtype=dtype)
    assert torch.equal(to_batch(images, 3, 2, None), torch.full((1, 3, 4, 4), edge))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("value", [-0.002, -0.00101, 1.002])
def test_an_overshoot_beyond_a_thousandth_is_refused(value, dtype):
    images = torch.full((3, 4, 4), 0.5, dtype=dtype)
    images[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"run from .* must lie in \[0, 1\]"):
        to_batch(images, 3, 2, None)


# Refusals: the message holds the value, the rule and the way out.

ZEROS = torch.zeros(3, 8, 8)
REFUSED = {
    "0 to 255": (255 * torch.eye(8).expand(3, 8, 8), ["from 0 to 255", "in [0, 1]", "divide 0..255 by 255"]),
    "-1 to 1": (ZEROS - 1, ["from -1 to -1", "in [0, 1]", "map [-1, 1] by (x + 1) / 2"]),
    "NaN": (torch.full((3, 8, 8), torch.nan), ["nan", "in [0, 1]"]),
    "infinity": (torch.full((3, 8, 8), torch.inf), ["inf", "in [0, 1]"]),
    "empty batch": (torch.zeros(0, 3, 8, 8), ["(0, 3, 8, 8)", "are empty", "at least one picture"]),
    "empty side": (np.zeros((0, 8, 3), np.uint8), ["(1, 3, 0, 8)", "are empty", "at least one pixel"]),
    "empty picture": (Image.new("RGB", (0, 5)), ["0 x 5 pixels", "empty", "at least one pixel"]),
    "empty 16-bit picture": (Image.new("I;16", (5, 0)), ["5 x 0 pixels", "empty", "at least one pixel"]),
    "indivisible": (torch.zeros(3, 9, 8), ["9 x 8", "divisible by 4", "8 or 12 x 8"]),
    "indivisible array": (np.zeros((8, 13, 3), np.uint8), ["8 x 13", "divisible by 4", "8 x 12 or 16"]),
    "smaller than the factor": (torch.zeros(3, 3, 8), ["3 x 8", "divisible by 4", "4 x 8"]),
    "small picture": (Image.new("RGB", (3, 8)), ["3 x 8 pixels", "smaller than 4", "resize=..."]),
    "4 channels": (torch.zeros(4, 8, 8), ["(1, 4, 8, 8)", "4 channels", "takes 3", "tensors are (B, C, H, W)"]),
    "grey array": (np.zeros((8, 8, 1), np.uint8), ["1 channels", "takes 3", "PIL images are converted"]),
    "channels last": (torch.zeros(8, 8, 3), ["(1, 8, 8, 3)", "takes 3", "arrays (B, H, W, C)"]),
    "2 dimensions": (torch.zeros(8, 8), ["(8, 8)", "(B, C, H, W)", "(C, H, W) for one picture"]),
    "5 dimensions": (torch.zeros(1, 1, 3, 8, 8), ["(1, 1, 3, 8, 8)", "(B, C, H, W)"]),
    "2-d array": (np.zeros((8, 8), np.uint8), ["(8, 8)", "(H, W, C) or (B, H, W, C)", "array[..., None]"]),
    "int64": (ZEROS.long(), ["torch.int64", "uint8, or float in [0, 1]"]),
    "bool": (ZEROS.bool(), ["torch.bool", "uint8, or float in [0, 1]"]),
    "float array": (np.zeros((8, 8, 3)), ["float64", "arrays are uint8", "for floats pass a tensor"]),
    "list of arrays": ([np.zeros((8, 8, 3), np.uint8)], ["ndarray", "lists hold PIL images", "stack arrays"]),
    "list of tensors": ([ZEROS], ["Tensor", "lists hold PIL images", "stack arrays and tensors"]),
    "empty list": ([], ["empty list", "pass at least one"]),
    "mode F": (Image.new("F", (8, 8)), ["mode F", "no stated range", "pass a float tensor in [0, 1]"]),
    "mode I out of range": (Image.new("I", (8, 8), 70000), ["mode I", "70000..70000", "0..65535"]),
    "None": (None, ["NoneType", "pass PIL images, a uint8 array or a tensor"]),
    "str": ("cat.png", ["str", "pass PIL images, a uint8 array or a tensor"]),
    "unequal sizes": ([picture(0, 24, 20), picture(1, 20, 24)], ["2 sizes", "(20, 24)", "resize=...", "one by one"]),
    "sizes equal once cropped": ([picture(0, 24, 20), picture(1, 25, 20)], ["2 sizes", "(25, 20)", "resize=..."]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_with_the_value_the_rule_and_the_way_out(case):
    images, parts = REFUSED[case]
    with pytest.raises(ValueError, match="".join(f"(?=.*{re.escape(part)})" for part in parts)):
        to_batch(images, 3, 4, None)


@pytest.mark.parametrize("resize", [0, -8, 9, 8.0, (8, 8), "large", True])
def test_an_impossible_resize_is_refused_by_encode_and_by_the_model(tokenizer, resize):
    with pytest.raises(ValueError, match=re.escape(f"resize={resize!r}") + ".*downsample_factor=2, or None"):
        tokenizer.encode(picture(0), resize=resize)
    with pytest.raises(ValueError, match=re.escape(f"resize={resize!r}")):
        ImageTokenizer(tiny_config(resize=resize))


@settings(deadline=None)
@given(side=st.integers(1, 500), factor=st.integers(1, 64))
def test_the_named_multiples_are_the_nearest(side, factor):
    named = {int(number) for number in nearest_multiples(side, factor).split(" or ")}
    multiples = [multiple for multiple in range(factor, side + 2 * factor, factor) if abs(multiple - side) < factor]
    assert named == set(multiples or [factor])


# PIL modes.

RGB = NOISE[:6, :8]
LUMA = np.array([[0.299], [0.587], [0.114]])  # ITU-R 601-2
ALPHA = np.random.default_rng(1).integers(0, 256, RGB.shape[:2], dtype=np.uint8)
OPAQUE = ALPHA[..., None] / 255
FLAT = Image.fromarray(RGB // 128 * 255).quantize(8)  # of at most eight colours, so a palette loses nothing
FLAT_RGB = RGB // 128 * 255.0


def marked_transparent(image: Image.Image, transparency) -> Image.Image:
    """As a file that says so is read."""
    file = io.BytesIO()
    image.save(file, "PNG", transparency=transparency)
    return Image.open(file)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


FEW = RGB[..., 0] // 100 * 100  # three greys
DEEP = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1394  # to 65518
LIGHT = repeated(DEEP / 257)
INDEX = np.asarray(FLAT)
MODES = {
    "RGB": (Image.fromarray(RGB), RGB),
    "L": (Image.fromarray(RGB[..., 0]), repeated(RGB[..., 0])),
    "LA": (Image.fromarray(np.dstack([RGB[..., 0], ALPHA])), repeated(RGB[..., 0]) * OPAQUE + 255 * (1 - OPAQUE)),
    "RGBA": (Image.fromarray(np.dstack([RGB, ALPHA])), RGB * OPAQUE + 255 * (1 - OPAQUE)),
    "P": (FLAT, FLAT_RGB),
    "P, transparent": (marked_transparent(FLAT, 2), np.where(INDEX[..., None] == 2, 255, FLAT_RGB)),
    "P, alpha per colour": (
        marked_transparent(FLAT, bytes([0, 128, *[255] * 6])),
        np.select([INDEX[..., None] == 0, INDEX[..., None] == 1], [255, FLAT_RGB / 2 + 127.5], FLAT_RGB),
    ),
    "1": (Image.fromarray(RGB[..., 0] > 99), repeated((RGB[..., 0] > 99) * 255)),
    "CMYK": (Image.merge("CMYK", [*Image.fromarray(255 - RGB).split(), Image.new("L", (8, 6))]), RGB),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), RGB),
    "I;16": (Image.fromarray(DEEP), LIGHT),
    "I": (Image.fromarray(DEEP.astype(np.int32)), LIGHT),
    "I;16, transparent": (marked_transparent(Image.fromarray(DEEP), 1394), np.where(LIGHT[0, 1] == LIGHT, 255, LIGHT)),
    "L, transparent": (marked_transparent(Image.fromarray(FEW), 100), repeated(np.where(FEW == 100, 255, FEW))),
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_out_right(mode, channels):
    image, expected = MODES[mode]
    assert image.mode == mode.partition(",")[0]
    wanted = expected if channels == 3 else expected @ LUMA
    np.testing.assert_allclose(prepared(image, channels)[0], wanted, atol=3 if mode == "YCbCr" else 1.01)


STORED = {  # the pixels in a file whose tag says how to turn them upright, from the upright ones
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("orientation", STORED)
def test_pictures_are_turned_as_their_exif_tag_says(orientation, channels):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation](NOISE))).save(file, "PNG", exif=exif)
    assert np.array_equal(prepared(Image.open(file), channels), prepared(Image.fromarray(NOISE), channels))


# Size.


@settings(max_examples=30, deadline=None)
@given(width=st.integers(3, 60), height=st.integers(3, 60), half=st.integers(1, 20), seed=st.integers(0, 9))
def test_resize_brings_the_short_side_to_it_and_cuts_the_centred_square(width, height, half, seed):
    array, side = 64 + np.asarray(picture(seed, width, height)) // 2, 2 * half  # PIL clips between its two passes
    sides = [max(side, round(length * side / min(width, height))) for length in (height, width)]
    scaled = F.interpolate(chw(array)[None].float(), sides, mode="bicubic", antialias=True)
    top, left = ((length - side) // 2 for length in sides)
    expected = scaled[0, :, top : top + side, left : left + side].movedim(0, -1)
    np.testing.assert_allclose(prepared(Image.fromarray(array), resize=side)[0], expected, atol=1.5)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(8, 40), height=st.integers(8, 40), factor=st.integers(1, 8))
def test_without_a_resize_the_size_is_kept_but_for_a_centred_crop_to_multiples(width, height, factor):
    array = np.asarray(picture(0, width, height))
    top, left = (height % factor) // 2, (width % factor) // 2
    expected = array[top : top + height - height % factor, left : left + width - width % factor]
    np.testing.assert_allclose(prepared(Image.fromarray(array), factor=factor)[0], expected, atol=1e-4)


def test_of_a_line_the_middle_alone_is_resized():
    line = Image.fromarray(np.random.default_rng(1).integers(0, 256, (2, 5001, 3), dtype=np.uint8))
    middle = line.crop((2437, 0, 5001 - 2437, 2))  # 127 pixels, less than 64 times as long as high
    for turned in (False, True):
        pictures = [image.transpose(Image.Transpose.TRANSPOSE) if turned else image for image in (line, middle)]
        assert np.array_equal(*(prepared(image, resize=64) for image in pictures))


def test_encode_overrides_the_resize_of_the_config_in_both_directions(tokenizer):
    image, resizing = picture(0, 25, 21), ImageTokenizer(tiny_config(resize=8)).eval()
    resizing.load_state_dict(tokenizer.state_dict())
    assert resizing.encode(image).shape == (1, 4, 4)
    assert resizing.encode(image, resize=None).shape == (1, 10, 12)
    assert torch.equal(resizing.encode(image, resize=None), tokenizer.encode(image))
    assert torch.equal(tokenizer.encode(image, resize=8), resizing.encode(image))
    assert resizing.encode(image, resize=16).shape == (1, 8, 8)


def test_a_list_of_unequal_sizes_shares_a_batch_once_resized(tokenizer):
    images = [picture(0, 24, 20), picture(1, 33, 50)]
    expected = torch.cat([tokenizer.encode(image, resize=8) for image in images])
    assert torch.equal(tokenizer.encode(images, resize=8), expected)


def test_arrays_and_tensors_are_never_resized_and_who_asks_for_it_is_told(tokenizer):
    resizing = ImageTokenizer(tiny_config(resize=8)).eval()
    for images in (NOISE, chw(NOISE)):
        assert resizing.encode(images).shape == resizing.encode(images, resize=None).shape == (1, 10, 12)
        with pytest.raises(ValueError, match="resize=8 is for PIL images; arrays and tensors are coded as they are"):
            tokenizer.encode(images, resize=8)


@pytest.mark.parametrize("channels", [3, 1])
def test_a_picture_survives_the_way_to_a_tensor_and_back(channels):
    image = Image.fromarray(NOISE).convert("RGB" if channels == 3 else "L")
    assert np.array_equal(np.asarray(tensor_to_pil(pil_to_tensor(image) / 255)), np.asarray(image))
