"""Accelerated models where the world around them is not the usual one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.autograd.forward_ad as forward_ad
from acceleration import assert_close, counted, tensors_of
from timm.models._features_fx import create_feature_extractor as timm_feature_extractor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from user_libraries import LIBRARIES, images

import clipfast

pytestmark = pytest.mark.filterwarnings("ignore")


def models(library: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    subject = LIBRARIES[library]()
    plain, model = (m.to(dtype).eval() for m in subject.models)
    return plain, model, subject.inputs(dtype)


def image_name(x: dict[str, Any]) -> str:
    return next(name for name in ("image", "pixel_values", "x") if name in x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("library", LIBRARIES)
def test_another_default_device(library: str, dtype: torch.dtype) -> None:
    plain, model, x = models(library, dtype)
    with torch.no_grad():
        expected = tensors_of(plain(**x))
        with torch.device("meta"), counted() as calls:
            actual = tensors_of(model(**x))
    assert_close(actual, expected, 2e-6 if dtype == torch.float32 else 1e-12)
    # calls for hidden states go through the blocks, and not through the stack that is counted
    assert calls or library in ("clipfast", "transformers siglip")
    assert not (library != "clipfast" and clipfast.acceleration(model).fell_back)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("library", ["transformers", "timm", "clipfast"])
def test_forward_mode_gives_tangents(library: str, grad: bool) -> None:
    plain, model, x = models(library)
    name = image_name(x)
    direction = torch.randn(x[name].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tangents = []
    with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        for m in (plain, model):
            output = tensors_of(m(**x | {name: forward_ad.make_dual(x[name], direction)}))[0]
            tangents.append(forward_ad.unpack_dual(output).tangent)
    assert tangents[0].abs().max() > 0
    assert_close([tangents[1]], [tangents[0]], 1e-12)


# a batch of SigLIP 2 is more than its pixels
@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "transformers siglip"])
def test_torch_func(library: str) -> None:
    plain, model, x = models(library)
    name, results = image_name(x), []
    for m in (plain, model):
        parameters = dict(m.named_parameters())

        def loss(parameters: dict[str, Tensor], image: Tensor, m: nn.Module = m) -> Tensor:
            image = image[None].expand(2, -1, -1, -1)
            return tensors_of(torch.func.functional_call(m, parameters, (), x | {name: image}))[0].square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[name])
        changed = torch.func.functional_call(m, {k: 1.1 * v for k, v in parameters.items()}, (), x)
        results.append([*gradients.values(), *tensors_of(changed)])
    scale = max(t.abs().max() for t in results[0])
    assert scale > 0
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-12 * scale


def test_torchvisions_feature_extractor() -> None:
    plain, model, _ = models("torchvision")
    assert get_graph_node_names(model) == get_graph_node_names(plain)
    wanted = {"encoder.layers.encoder_layer_0": "block", "heads.head": "head"}
    a, b = (create_feature_extractor(m, wanted)(images(torch.float64)) for m in (model, plain))
    assert a.keys() == b.keys()
    assert_close(list(a.values()), list(b.values()), 0)


def test_timms_feature_extractor() -> None:
    plain, model, _ = models("timm")
    a, b = (timm_feature_extractor(m, ["blocks.0", "head"])(images(torch.float64)) for m in (model, plain))
    assert_close(tensors_of(a), tensors_of(b), 0)


class _Gelu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.nn.functional.gelu else result


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.ops.aten.gelu.default else result


@pytest.mark.parametrize("mode", [_Gelu, _Mode])
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_modes_of_users_see_the_library(library: str, mode: type) -> None:
    plain, model, x = models(library)
    with torch.no_grad():
        before = tensors_of(plain(**x))
        with mode():
            expected, actual = tensors_of(plain(**x)), tensors_of(model(**x))
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-6
    assert_close(actual, expected, 0)


@pytest.mark.parametrize("how", ["class", "_from_config", "from_pretrained"])
@pytest.mark.parametrize("tower", ["vision_model", "text_model", ""])
def test_new_models_of_an_accelerated_class(how: str, tower: str, tmp_path: Path) -> None:
    plain = tiny.transformers_clip().eval()
    whole = clipfast.accelerate(copy.deepcopy(plain))
    model, original = (m.get_submodule(tower) for m in (whole, plain))
    if how == "from_pretrained":
        model.save_pretrained(tmp_path)
        new = type(model).from_pretrained(tmp_path)
    else:
        new = type(model)(model.config) if how == "class" else type(model)._from_config(model.config)
        new.load_state_dict(model.state_dict())
    assert isinstance(new, type(original))
    assert "could be" in str(clipfast.acceleration(new)) or "not accelerated" in str(clipfast.acceleration(new))
    asked = {"vision_model": ["pixel_values"], "text_model": ["input_ids"], "": ["input_ids", "pixel_values"]}
    inputs = LIBRARIES["transformers"]().inputs(torch.float32)
    x = {name: inputs[name] for name in asked[tower]}
    with torch.no_grad():
        expected = tensors_of(original(**x))
        assert_close(tensors_of(new.eval()(**x)), expected, 0)
        assert_close(tensors_of(copy.deepcopy(new)(**x)), expected, 0)
        with counted() as calls:
            assert_close(tensors_of(clipfast.accelerate(new)(**x)), expected, 2e-5)
    assert calls
    assert type(clipfast.restore(new)).__name__ == type(original).__name__


@pytest.mark.parametrize("library", ["open_clip", "timm", "torchvision"])
def test_data_parallel_without_gpus(library: str) -> None:
    plain, model, x = models(library)
    assert_close(tensors_of(nn.DataParallel(model)(**x)), tensors_of(plain(**x)), 1e-12)
