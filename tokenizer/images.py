"""Images as people have them -> float tensors in [0, 1]; the one place that knows ranges, sizes and channel order.

Shapes: B batch, C channels (1 or 3), H W sides in pixels.
"""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

RANGE_TOLERANCE = 1e-3  # resizers overshoot a little; further out is a mistake
FARTHEST = 64  # times its short side that a picture may be long before a square of its middle is taken

Images = Image.Image | list[Image.Image] | np.ndarray | Tensor


def to_model_range(images: Tensor, low: float, high: float) -> Tensor:
    """[0, 1], what people use, to [low, high], what the network sees."""
    return images * (high - low) + low


def from_model_range(pixels: Tensor, low: float, high: float) -> Tensor:
    """[low, high], what the network sees, to [0, 1], what people use; not clamped."""
    return (pixels - low) / (high - low)


def to_batch(images: Images, channels: int, factor: int, resize: int | None) -> Tensor:
    """One image or several, of any accepted kind, to float32 (B, C, H, W) in [0, 1], sides divisible by `factor`.

    PIL images (one or a list) are turned upright, converted, and prepared as `prepare_pil` says; uint8 numpy arrays
    (H, W, C) or (B, H, W, C) and tensors (C, H, W) or (B, C, H, W), uint8 or float in [0, 1], are taken as they are.
    Raises ValueError with the value, the rule and the way out for everything else.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        batch = stack_pil(images, channels, factor, resize)
    elif isinstance(images, np.ndarray):
        batch = from_numpy(images)
    elif isinstance(images, Tensor):
        batch = images[None] if images.ndim == 3 else images
    else:
        raise ValueError(f"images of type {type(images).__name__}; pass PIL images, a uint8 array or a tensor")
    check_shape(batch.shape, channels, factor)
    return to_unit_range(batch)


def stack_pil(images: list[Image.Image], channels: int, factor: int, resize: int | None) -> Tensor:
    """A list of PIL images to uint8 (B, C, H, W)."""
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(f"a list holding {type(image).__name__}; lists hold PIL images, stack arrays and tensors")
    if not images:
        raise ValueError("an empty list of images; pass at least one")
    converted = (convert(image, channels) for image in images)  # a generator: with a resize only the squares are kept
    if resize is None:
        converted = list(converted)
        sizes = {image.size for image in converted}
        if len(sizes) > 1:
            raise ValueError(
                f"images of {len(sizes)} sizes (width, height), such as {sorted(sizes)[:2]}, cannot share a batch; "
                f"pass resize=..., or encode them one by one"
            )
    return torch.stack([pil_to_tensor(resize_and_crop(image, factor, resize)) for image in converted])


def from_numpy(images: np.ndarray) -> Tensor:
    """uint8 (H, W, C) or (B, H, W, C) to uint8 (B, C, H, W)."""
    if images.dtype != np.uint8:
        raise ValueError(f"array of {images.dtype}; arrays are uint8, for floats pass a tensor (B, C, H, W) in [0, 1]")
    if images.ndim not in (3, 4):
        raise ValueError(
            f"array of shape {images.shape}; the rule is (H, W, C) or (B, H, W, C), grey is array[..., None]"
        )
    batch = images[None] if images.ndim == 3 else images
    return torch.from_numpy(np.require(batch, requirements=["C", "W"])).permute(0, 3, 1, 2)  # torch warns of read only


def check_shape(shape: torch.Size, channels: int, factor: int) -> None:
    """Raise ValueError unless `shape` is (B, channels, H, W) with sides divisible by `factor`."""
    if len(shape) != 4:
        raise ValueError(f"images of shape {tuple(shape)}; the rule is (B, C, H, W), or (C, H, W) for one picture")
    if shape[1] != channels:
        raise ValueError(
            f"images of shape {tuple(shape)} have {shape[1]} channels and this model takes {channels}; "
            f"tensors are (B, C, H, W), arrays (B, H, W, C), PIL images are converted"
        )
    if 0 in shape:
        raise ValueError(f"images of shape {tuple(shape)} are empty; pass at least one picture of at least one pixel")
    if shape[2] % factor or shape[3] % factor:
        raise ValueError(
            f"sides {shape[2]} x {shape[3]} (height x width) must be divisible by {factor}, this model's "
            f"downsample_factor; crop or pad to {nearest_multiples(shape[2], factor)} x "
            f"{nearest_multiples(shape[3], factor)}"
        )


def nearest_multiples(side: int, factor: int) -> str:
    """The side itself if `factor` divides it, else the two multiples around it."""
    below = side // factor * factor
    if below < 1:
        return str(factor)
    return str(side) if below == side else f"{below} or {below + factor}"


def to_unit_range(images: Tensor) -> Tensor:
    """uint8, or float in [0, 1], to float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}; the rule is uint8, or float in [0, 1]")
    images = images.float()
    low, high = (round(value.item(), 6) for value in torch.aminmax(images))  # the tolerance itself, in any float type
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # also true of NaN
        raise ValueError(
            f"float images run from {low:g} to {high:g}; they must lie in [0, 1]: "
            f"divide 0..255 by 255, map [-1, 1] by (x + 1) / 2"
        )
    return images.clamp(0, 1)


def prepare_pil(image: Image.Image, channels: int, factor: int, resize: int | None) -> Image.Image:
    """Upright, in the model's channels, resized and cropped: `convert`, then `resize_and_crop`."""
    return resize_and_crop(convert(image, channels), factor, resize)


def resize_and_crop(image: Image.Image, factor: int, resize: int | None) -> Image.Image:
    """An RGB or grey image with both sides divisible by `factor`.

    `resize` is the side in pixels: the short side is brought to it (bicubic, antialiased), then the centred square is
    cut out. Without it the size is kept and a centred crop makes both sides divisible by `factor`.
    """
    if resize is not None:
        image = resize_short_side(without_far_ends(image), resize)
        width = height = resize
    else:
        width, height = (side // factor * factor for side in image.size)
    if min(width, height) < 1:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is smaller than {factor}; pass resize=...")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of a picture, at most FARTHEST times as long as it is wide: of a line, all of it would fill memory."""
    left, top = (max(0, side - FARTHEST * min(image.size) + 1) // 2 for side in image.size)  # as much at either end
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """The short side to `side` pixels, the long one in proportion."""
    short = min(image.size)
    if short == side:
        return image
    return image.resize([max(side, round(length * side / short)) for length in image.size], Image.Resampling.BICUBIC)


def convert(image: Image.Image, channels: int) -> Image.Image:
    """Any PIL mode to upright 8-bit RGB or grey: transparency onto white, 16-bit scaled, palettes looked up."""
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels is empty; pass at least one pixel")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = from_16_bit(image)
    elif image.mode == "F":
        raise ValueError("a PIL image of mode F has no stated range; pass a float tensor in [0, 1]")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16 and I) to 8-bit: 65535 is white, and so is the value marked as transparent, if any."""
    values = np.array(image, dtype=np.int64)
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"a PIL image of mode {image.mode} holds {values.min()}..{values.max()}; the rule is 0..65535")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def pil_to_tensor(image: Image.Image) -> Tensor:
    """An RGB or grey PIL image to uint8 (C, H, W)."""
    array = np.array(image)  # a copy: PIL's own buffer is read only
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)


def tensor_to_pil(image: Tensor) -> Image.Image:
    """Float (C, H, W) in [0, 1], values outside clamped, to an RGB or grey PIL image."""
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
