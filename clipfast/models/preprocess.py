"""How a picture becomes an image tower's input: what weights were trained with, as their configurations say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")

# PIL's numbers in transformers' files
_RESAMPLING = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class PreprocessConfig:
    """How a picture becomes an image tower's input, with the field names of open_clip's ``preprocess_cfg``.

    Attributes:
        mean: Of red, green and blue, in [0, 1]; subtracted.
        std: Of red, green and blue; divided by.
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize_mode: Which side becomes the input's: the ``"shortest"``, and the centre is cut out; the ``"longest"``,
            and what is missing is filled; or both (``"squash"``), whatever the picture's aspect.
        fill_color: What fills, from 0 to 255.

    Raises:
        ValueError: A value is none of these.
    """

    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            value = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
            if len(value) != 3 or not all(isinstance(number, (int, float)) for number in value):
                raise ValueError(f"preprocess_cfg.{name}: got {value!r}, expected 3 numbers")
            object.__setattr__(self, name, tuple(map(float, value)))
        if min(self.std) <= 0:
            raise ValueError(f"preprocess_cfg.std: got {self.std}, expected 3 positive numbers")
        for name, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"preprocess_cfg.{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, known))}"
                )
        if not isinstance(self.fill_color, int) or not 0 <= self.fill_color <= 255:
            raise ValueError(f"preprocess_cfg.fill_color: got {self.fill_color!r}, expected 0 to 255")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PreprocessConfig:
        """Make one of open_clip's ``preprocess_cfg``; the size is the model's, and pictures are RGB.

        Raises:
            ValueError: A key is unknown, or a value is not served.
        """
        values = dict(values)
        values.pop("size", None)
        if (mode := values.pop("mode", "RGB")) != "RGB":
            raise ValueError(f"preprocess_cfg.mode: got {mode!r}, expected 'RGB'")
        known = [field.name for field in fields(cls)]
        if wrong := [name for name in values if name not in known]:
            raise ValueError(f"preprocess_cfg: got key {wrong[0]!r}, expected one of {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any]) -> PreprocessConfig:
        """Make one of what transformers keeps in ``preprocessor_config.json``.

        Raises:
            ValueError: It asks for what is not served, such as pictures without normalisation.
        """
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not values.get(name, True):
                raise ValueError(f"{name}: got {values[name]!r}, expected true")
        if abs(float(values.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-6:
            raise ValueError(f"rescale_factor: got {values['rescale_factor']!r}, expected 1/255")
        resample = values.get("resample", 3)
        if resample not in _RESAMPLING:
            raise ValueError(f"resample: got {resample!r}, expected 2 (bilinear) or 3 (bicubic)")
        size = values.get("size", {})
        is_squashed = isinstance(size, Mapping) and {"height", "width"} <= size.keys()
        own = SIGLIP if is_squashed else cls()
        return cls(
            mean=values.get("image_mean") or own.mean,
            std=values.get("image_std") or own.std,
            interpolation=_RESAMPLING[resample],
            resize_mode="squash" if is_squashed else "shortest",
        )


SQUASHED = PreprocessConfig(resize_mode="squash")
SIGLIP = PreprocessConfig((0.5,) * 3, (0.5,) * 3, resize_mode="squash")
CLIPA = PreprocessConfig(IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
