"""Triton kernels, one file a kernel family; installed as `clipfast.kernels`."""

import os
import sys

_clone = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "kernels":
    # Python was started in a clone, where others' `import kernels` finds this folder: they mean another package
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _spec = PathFinder.find_spec("kernels", [p for p in sys.path if os.path.abspath(p) != _clone])
    if _spec is not None and _spec.has_location:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        # transformers asks what it has found for a file
        del __file__
elif getattr(sys.modules["clipfast"], "__file__", None) is None:
    # Python was started beside a clone named clipfast, and its folder was taken for the package
    raise ImportError(f"{_clone} holds clipfast's sources and is not the package: run `pip install -e {_clone}`")
