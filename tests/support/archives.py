"""TorchScript archives like OpenAI's, and pickles that would run code."""

from __future__ import annotations

import os
import pickle
import typing
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


class OpenAIArchive(nn.Module):
    """A CLIP with the buffers that OpenAI's archives hold beside its weights, at its root as there."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 100)):
            self.register_buffer(name, torch.tensor(value))
        # lists are pickled with their types
        self.names = torch.jit.Attribute(["a cat", "a dog"], typing.List[str])  # noqa: UP006 (TorchScript's way)

    def forward(self, image: Tensor) -> Tensor:
        return self.visual(image)


def save_scripted(clip: nn.Module, path: Path) -> Path:
    """Write OpenAI's kind of archive."""
    return _save(path, lambda: torch.jit.script(OpenAIArchive(clip)))


def save_scripted_without_tensors(path: Path) -> Path:
    """Write an archive of a module that has no weights."""
    return _save(path, lambda: torch.jit.script(nn.ReLU()))


def save_traced(clip: nn.Module, path: Path) -> Path:
    """Write what tracing makes."""
    images, tokens = torch.randn(2, 3, 32, 32, dtype=clip.logit_scale.dtype), torch.randint(0, 100, (2, 16))
    clip.eval().requires_grad_(False)
    methods = {"forward": (images, tokens), "encode_image": (images,), "encode_text": (tokens,)}
    return _save(path, lambda: torch.jit.trace_module(clip, methods, check_trace=False))


def loaded_by_torch(path: Path) -> dict[str, Tensor]:
    """Return an archive's state dict as PyTorch reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path).state_dict()


def _save(path: Path, compile_: Callable[[], torch.jit.ScriptModule]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, its archives are not
        compile_().save(path)
    return path


class Malice:
    """Unpickled by Python's own rules, it makes a folder; ``module`` and ``name`` say how."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"mkdir {self.trace}",)


def plant_in_archive(archive: Path, malice: object) -> None:
    """Put an object into the pickle of a TorchScript archive."""
    with zipfile.ZipFile(archive) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    pickled = next(name for name in members if name.endswith("/data.pkl"))
    # a protocol that TorchScript's reader knows; the object comes before what was there, so that it runs at all
    members[pickled] = pickle.dumps(malice, protocol=2)[:-1] + b"0" + members[pickled][2:]
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
