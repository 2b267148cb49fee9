"""From a picture to the tensor that a model takes, as the model's own validation does it.

The steps and their rounding are those of transformers' image processors (preprocessor_config.json) and of timm's
`transforms_imagenet_eval` with torchvision (pretrained_cfg in config.json), on Pillow.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ibnorm_export.artifacts.tokenizer import read_json
from ibnorm_export.errors import IBNormError, quoted
from ibnorm_export.optional_packages import import_package

__all__ = ["Preprocessing", "find_preprocessing"]

PROCESSOR_FILE: Final = "preprocessor_config.json"

#: Numbers of Pillow's filters, which transformers stores, by the names that timm stores.
_FILTERS: Final = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5, "random": 2}

#: The longest side of an image that a model takes, in pixels, and the largest factor.
_LARGEST: Final = 4096
_LARGEST_NUMBER: Final = 1e38

_IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
_IMAGENET_STD: Final = (0.229, 0.224, 0.225)

#: Classes of transformers whose processors read a single number as both sides of a square.
_SQUARE: Final = ("ViT", "DeiT", "Beit", "Swin")

#: Classes of transformers whose processors take further steps, and settings that ask for some.
_OTHER_STEPS: Final = (
    "EfficientNet",
    "ImageGPT",
    "Levit",
    "MobileViT",
    "PPLCNet",
    "Perceiver",
    "PoolFormer",
    "Siglip2",
)
_OTHER_SETTINGS: Final = ("do_flip_channel_order", "rescale_offset", "do_pad")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The steps in their order: resize, crop the centre, scale, normalise.

    Args:
        source: the file that states them.
        resize: height and width to resize to, in pixels; None keeps the size.
        shortest: size of the shorter side, in pixels, in place of `resize`; the other side follows.
        interpolation: number of Pillow's filter.
        crop: height and width of the crop, in pixels; None does not crop.
        torchvision: whether crop and scale round as torchvision does; else as transformers does.
        scale: factor of the values 0 to 255.
        mean, std: of each channel, after scaling; None does not normalise.
    """

    source: str
    _: KW_ONLY
    resize: tuple[int, int] | None = None
    shortest: int | None = None
    interpolation: int = 2
    crop: tuple[int, int] | None = None
    torchvision: bool = False
    scale: float = 1.0 / 255.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """What results depend on: everything but the place of the file."""
        return {key: value for key, value in asdict(self).items() if key != "source"}

    def apply(self, picture: Any, channels: int) -> NDArray[np.float32]:
        """Return the tensor (channels, height, width) of a picture of Pillow.

        Args:
            picture: of any mode and size.
            channels: 3 for colours, 1 for shades of grey.
        """
        picture = picture.convert("RGB" if channels == 3 else "L")
        size = self._new_size(picture.height, picture.width)
        if size != (picture.height, picture.width):
            picture = picture.resize((size[1], size[0]), self.interpolation)
        pixels = np.asarray(picture)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if self.crop is not None:
            pixels = _centre(pixels, self.crop, torchvision=self.torchvision)
        values = self._values(pixels.shape[2])
        result = np.empty((pixels.shape[2], *pixels.shape[:2]), dtype=np.float32)
        for channel, own in enumerate(values):
            np.take(own, pixels[:, :, channel], out=result[channel], mode="clip")  # the mode that needs no buffer
        return result

    def _values(self, channels: int) -> NDArray[np.float32]:
        """What scaling and normalising make of each value of a pixel: (channels, 256)."""
        levels = np.arange(256)[:, None]
        values: NDArray[Any]
        if self.torchvision:
            values = levels.astype(np.float32) / np.float32(255.0)
        else:
            values = (levels.astype(np.float64) * self.scale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            self._check_channels(channels)
            values = (values - np.array(self.mean, dtype=np.float32)) / np.array(self.std, dtype=np.float32)
        return np.broadcast_to(values, (256, channels)).T.copy()

    def _check_channels(self, channels: int) -> None:
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) not in (1, channels):
                raise IBNormError(
                    f"{self.source}: {name} has {len(numbers)} numbers, and images have {channels} channels; it must "
                    f"have 1 or {channels}"
                )

    def _new_size(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is not None:
            return self.resize
        if self.shortest is None:
            return height, width
        short, long = min(height, width), max(height, width)
        other = int(self.shortest * long / short)
        return (self.shortest, other) if height <= width else (other, self.shortest)


def _centre(pixels: NDArray[np.uint8], crop: tuple[int, int], *, torchvision: bool) -> NDArray[np.uint8]:
    """The centre of (height, width, channels); what is missing is 0."""
    for axis, wanted in enumerate(crop):
        have = pixels.shape[axis]
        if have < wanted:
            before = (wanted - have) // 2 if torchvision else (wanted - have + 1) // 2
            room = [(0, 0)] * pixels.ndim
            room[axis] = (before, wanted - have - before)
            pixels = np.pad(pixels, room)
        elif have > wanted:
            start = round((have - wanted) / 2.0) if torchvision else (have - wanted) // 2
            pixels = pixels[start : start + wanted] if axis == 0 else pixels[:, start : start + wanted]
    return pixels


def find_preprocessing(folder: Path) -> Preprocessing | None:
    """Read the preprocessing that a folder states; None if it states none.

    Raises:
        IBNormError: a setting is not one that this version can follow.
    """
    if (folder / PROCESSOR_FILE).is_file():
        return _of_transformers(folder / PROCESSOR_FILE)
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        stated = config.get("pretrained_cfg")
        if isinstance(stated, dict):
            return _of_timm(folder / "config.json", stated)
    return None


def _of_transformers(file: Path) -> Preprocessing:
    config = read_json(file)
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    _check_steps(file, config, kind)
    resize, shortest = None, None
    crop = _sides(file, config, "crop_size") if config.get("do_center_crop") else None
    if config.get("do_resize", True) and config.get("size") is not None:
        size = config["size"]
        if isinstance(size, dict) and "shortest_edge" in size:
            shortest = _whole(file, "size.shortest_edge", size["shortest_edge"])
        elif isinstance(size, int) and not kind.startswith(_SQUARE):
            shortest = _whole(file, "size", size)
        else:
            resize = _sides(file, config, "size")
    if kind.startswith("ConvNext") and shortest is not None:  # its own rule: small images are cut, large ones squeezed
        side, part = shortest, _number(file, "crop_pct", config.get("crop_pct", 224 / 256))
        if side >= 384:
            resize, shortest = (side, side), None
        else:
            shortest, crop = _whole(file, "size.shortest_edge / crop_pct", int(side / part)), (side, side)
    normalised = bool(config.get("do_normalize", True))
    return Preprocessing(
        str(file),
        resize=resize,
        shortest=shortest,
        interpolation=_whole(file, "resample", config.get("resample", 2), least=0, most=max(_FILTERS.values())),
        crop=crop,
        scale=_number(file, "rescale_factor", config.get("rescale_factor", 1 / 255))
        if config.get("do_rescale", True)
        else 1.0,
        mean=_numbers(file, "image_mean", config.get("image_mean", (0.5, 0.5, 0.5))) if normalised else None,
        std=_spreads(file, "image_std", config.get("image_std", (0.5, 0.5, 0.5))) if normalised else None,
    )


def _check_steps(file: Path, config: Mapping[str, Any], kind: str) -> None:
    """Refuse a processor that does more than resize, crop, scale and normalise: accuracy would be that of other images.

    Raises:
        IBNormError: it does.
    """
    settings = [name for name in _OTHER_SETTINGS if config.get(name)]
    if kind.startswith(_OTHER_STEPS) or settings:
        what = settings[0] if settings else "image_processor_type"
        raise IBNormError(
            f"{file}: {what} is {quoted(config[what] if settings else kind)}; this version resizes, crops, scales and "
            "normalises, and this processor takes further steps: give prepared images in an .npz file"
        )


def _of_timm(file: Path, config: dict[str, Any]) -> Preprocessing:
    size = config.get("input_size")
    if not isinstance(size, list) or len(size) != 3:
        raise IBNormError(f"{file}: pretrained_cfg.input_size is {quoted(size)}; it must be [channels, height, width]")
    height, width = (_whole(file, "pretrained_cfg.input_size", side) for side in size[1:])
    part = _number(file, "pretrained_cfg.crop_pct", config.get("crop_pct") or 0.875)
    mode, name = config.get("crop_mode") or "center", config.get("interpolation") or "bicubic"
    what = "pretrained_cfg.input_size / crop_pct"
    scaled = _whole(file, what, math.floor(height / part)), _whole(file, what, math.floor(width / part))
    if mode not in ("center", "squash") or (mode == "center" and scaled[0] != scaled[1]):
        raise IBNormError(
            f"{file}: pretrained_cfg.crop_mode is {quoted(mode)} for {height} x {width}; this version crops the centre "
            "of a square, or squashes: give prepared images in an .npz file"
        )
    if not isinstance(name, str) or name not in _FILTERS:
        raise IBNormError(
            f"{file}: pretrained_cfg.interpolation is {quoted(name)}; it must be one of {', '.join(_FILTERS)}"
        )
    return Preprocessing(
        str(file),
        resize=scaled if mode == "squash" else None,
        shortest=scaled[0] if mode == "center" else None,
        interpolation=_FILTERS[name],
        crop=(height, width),
        torchvision=True,
        mean=_numbers(file, "pretrained_cfg.mean", config.get("mean") or _IMAGENET_MEAN),
        std=_spreads(file, "pretrained_cfg.std", config.get("std") or _IMAGENET_STD),
    )


def _whole(file: Path, key: str, value: object, *, least: int = 1, most: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise IBNormError(f"{file}: {key} is {quoted(value)}; it must be a whole number from {least} to {most}")
    return value


def _number(file: Path, key: str, value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 1.0 / _LARGEST_NUMBER < value < _LARGEST_NUMBER
    ):
        raise IBNormError(f"{file}: {key} is {quoted(value)}; it must be a number above 0 that float32 can hold")
    return float(value)


def _numbers(file: Path, key: str, value: object) -> tuple[float, ...]:
    listed: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    if not listed or not all(isinstance(item, (int, float)) and abs(item) < _LARGEST_NUMBER for item in listed):
        raise IBNormError(f"{file}: {key} is {quoted(value)}; it must be a list of numbers")
    return tuple(float(item) for item in listed)


def _spreads(file: Path, key: str, value: object) -> tuple[float, ...]:
    found = _numbers(file, key, value)
    if not all(number > 0.0 for number in found):
        raise IBNormError(f"{file}: {key} is {quoted(value)}; values are divided by it, so it must be above 0")
    return found


def _sides(file: Path, config: Mapping[str, Any], key: str) -> tuple[int, int]:
    """Height and width: of {"height", "width"}, or of one number for both."""
    value = config.get(key)
    if isinstance(value, dict):
        return _whole(file, f"{key}.height", value.get("height")), _whole(file, f"{key}.width", value.get("width"))
    side = _whole(file, key, value)
    return side, side


def open_picture(content: bytes) -> Any:
    """Decode the bytes of an image file.

    Raises:
        OSError, ValueError, SyntaxError: it is damaged, empty or absurdly large.
        BackendUnavailable: Pillow is not installed.
    """
    if not content:
        raise ValueError("it is empty")
    pillow = import_package("PIL.Image", extra="evaluate", purpose="reading images")
    try:
        picture = pillow.open(io.BytesIO(content))
        picture.load()
    except pillow.UnidentifiedImageError as error:
        raise ValueError("it is not an image that Pillow knows") from error
    except pillow.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    return picture
