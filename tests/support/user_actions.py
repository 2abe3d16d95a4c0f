"""What users do to models, as actions that can be done to two models alike, drawn at random from a seed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import accelerate
import peft
import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_submodules
from acceleration import tensors_of
from torch import Tensor, nn
from transformers.utils import ModelOutput

import clipfast
from clipfast.models.accelerated import Accelerated


@dataclass
class Subject:
    """Two models that are treated alike: the plain one and the one that has to follow.

    Attributes:
        models: ``[plain, accelerated]``.
        inputs: Makes the arguments of a call from a dtype.
        functions: Functions and methods that this library's code calls, as (owner, name).
        attributes: Changes of attributes by the kind of module: (name, value or function of the old one).
        targets: What LoRA adapts.
        undo: What takes back those changes that last.
    """

    models: list[nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    functions: list[tuple[Any, str]]
    attributes: dict[type, list[tuple[str, Any]]]
    targets: list[str]
    undo: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    dtype: torch.dtype = torch.float64
    grad: bool = False
    adapters: list[Any] | None = None

    def paths(self, choose: Callable[[nn.Module], bool]) -> list[str]:
        """Return the paths of modules inside, as both models have them."""
        return [path for path, m in self.models[0].named_modules() if path and choose(m)]

    def each(self, path: str) -> list[nn.Module]:
        return [m.get_submodule(path) for m in self.models]


def scaled(output: Any) -> Any:
    """Change what a function returns, whatever holds the tensors."""
    if isinstance(output, Tensor):
        # no normalisation takes this back
        return output * 1.25 + 0.05 * output.roll(1, -1) if output.is_floating_point() else output
    if isinstance(output, tuple):
        return tuple(scaled(o) for o in output)
    if isinstance(output, ModelOutput):
        return type(output)(**{k: scaled(v) for k, v in output.items()})
    return output


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: scaled(function(*args, **kwargs))


def computes(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterDict) and not hasattr(
        module, "_clipfast_twin"
    )


def patch_instance(s: Subject, r: random.Random) -> str | None:
    path = r.choice(s.paths(computes))
    if any("forward" in m.__dict__ for m in s.each(path)):
        return None
    modules = s.each(path)
    for module in modules:
        module.forward = wrapped(module.forward)
    s.undo.append((f"unpatch {path}", lambda: [m.__dict__.pop("forward", None) for m in modules]))
    return f"patch {path}.forward"


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    own = name in vars(owner)
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old) if own else delattr(owner, name)


def is_wrapped_tower(s: Subject, cls: Any) -> bool:
    """Return whether a tower of a class has a method of its own, which holds the class's as it was then.

    The accelerated tower's holds what serves at each call: the class's as it is now.
    """
    return isinstance(cls, type) and any(
        isinstance(m, Accelerated | clipfast.CLIP | clipfast.ViT) and isinstance(m, cls) and "forward" in m.__dict__
        for m in s.models[1].modules()
    )


def patch_class(s: Subject, r: random.Random) -> str | None:
    module = s.models[0].get_submodule(r.choice(s.paths(computes)))
    cls = type(module)
    if any(name == f"restore {cls}" for name, _ in s.undo) or is_wrapped_tower(s, cls):
        return None
    forward = cls.forward
    s.undo.append((f"restore {cls}", replace_attribute(cls, "forward", wrapped_method(forward))))
    return f"patch {cls.__qualname__}"


def wrapped_method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scaled(function(self, *args, **kwargs))

    return method


def patch_function(s: Subject, r: random.Random) -> str | None:
    owner, name = r.choice(s.functions)
    if any(n == f"restore {owner}.{name}" for n, _ in s.undo) or is_wrapped_tower(s, owner):
        return None
    function = getattr(owner, name)
    changed = wrapped_method(function) if isinstance(owner, type) else wrapped(function)
    s.undo.append((f"restore {owner}.{name}", replace_attribute(owner, name, changed)))
    return f"patch {owner}.{name}"


def take_back(s: Subject, r: random.Random) -> str | None:
    if not s.undo:
        return None
    # the latest of a kind may stand on an earlier one
    name, undo = s.undo.pop()
    undo()
    return name


def hook(s: Subject, r: random.Random) -> str:
    path = r.choice(s.paths(computes))
    before = r.random() < 0.3
    handles = [
        m.register_forward_pre_hook(lambda m, args: scaled(args))
        if before
        else m.register_forward_hook(lambda m, args, output: scaled(output))
        for m in s.each(path)
    ]
    s.undo.append((f"unhook {path}", lambda: [h.remove() for h in handles]))
    return f"hook {path}"


def freeze(s: Subject, r: random.Random) -> str:
    name = r.choice([n for n, p in s.models[0].named_parameters()])
    value = r.random() < 0.5
    for m in s.models:
        dict(m.named_parameters())[name].requires_grad_(value)
    return f"requires_grad({value}) {name}"


def cast(s: Subject, r: random.Random) -> str:
    s.dtype = r.choice([torch.float32, torch.float64])
    for m in s.models:
        m.to(s.dtype)
    return f"to {s.dtype}"


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


def _replacement(module: nn.Module, r: random.Random) -> nn.Module:
    torch.manual_seed(r.randrange(1000))
    if isinstance(module, nn.LayerNorm):
        return nn.LayerNorm(module.normalized_shape, eps=r.choice([1e-5, 0.3]))
    if isinstance(module, nn.Linear):
        kind = r.choice([nn.Linear, OtherLinear])
        return kind(module.in_features, module.out_features, bias=module.bias is not None)
    return r.choice([nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Sequential(nn.GELU(), nn.Tanh())])


def replace_module(s: Subject, r: random.Random) -> str:
    kinds = (nn.LayerNorm, nn.Linear, nn.GELU)
    path = r.choice(s.paths(lambda m: type(m) in kinds or "GELU" in type(m).__name__))
    new = _replacement(s.models[0].get_submodule(path), r).to(s.dtype)
    for model in s.models:
        model.set_submodule(path, copy.deepcopy(new))
    return f"replace {path} by {type(new).__name__}"


def write(s: Subject, r: random.Random) -> str:
    name = r.choice([n for n, p in s.models[0].named_parameters()])
    how = r.choice(["in place", ".data", "numpy", "new Parameter"])
    for m in s.models:
        p = dict(m.named_parameters())[name]
        if how == "in place":
            with torch.no_grad():
                p.mul_(1.1)
        elif how == ".data":
            p.data *= 0.9
        elif how == "numpy":
            p.detach().numpy()[...] *= 1.1
        else:
            path, _, last = name.rpartition(".")
            setattr(m.get_submodule(path), last, nn.Parameter(p.detach() * 1.05, p.requires_grad))
    return f"write {name} {how}"


def change_attribute(s: Subject, r: random.Random) -> str | None:
    found = [p for p, m in s.models[0].named_modules() if any(isinstance(m, k) for k in s.attributes)]
    path = r.choice(found)
    module = s.models[0].get_submodule(path)
    name, value = r.choice([c for k, changes in s.attributes.items() if isinstance(module, k) for c in changes])
    if not hasattr(module, name):
        return None
    modules = s.each(path)
    olds = [getattr(m, name) for m in modules]
    for m in modules:
        setattr(m, name, value(getattr(m, name)) if callable(value) else value)
    if r.random() < 0.5:
        s.undo.append(
            (f"back {path}.{name}", lambda: [setattr(m, name, o) for m, o in zip(modules, olds, strict=True)])
        )
    return f"set {path}.{name}"


def lora(s: Subject, r: random.Random) -> str:
    if s.adapters is None:
        chosen = r.sample(s.targets, r.randint(1, len(s.targets)))
        config = peft.LoraConfig(target_modules=chosen, r=2, lora_dropout=r.choice([0.0, 0.0, 0.5]))
        s.adapters = [peft.get_peft_model(m, config) for m in s.models]
        values = torch.Generator().manual_seed(r.randrange(1000))
        for parts in zip(*(a.named_parameters() for a in s.adapters), strict=True):
            if "lora_" in parts[0][0]:
                drawn = 0.2 * torch.randn(parts[0][1].shape, generator=values)
                for _, p in parts:
                    p.data.copy_(drawn)
        for a in s.adapters:
            a.to(s.dtype)
        return f"LoRA on {chosen}"
    action = r.choice(["off", "on", "merge", "unmerge", "unload", "merge and unload"])
    layers = [[m for m in a.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)] for a in s.adapters]
    for adapter, tuned in zip(s.adapters, layers, strict=True):
        if action == "off":
            adapter.base_model.disable_adapter_layers()
        elif action == "on":
            adapter.base_model.enable_adapter_layers()
        elif action == "merge" and not any(t.merged for t in tuned):
            adapter.merge_adapter()
        elif action == "unmerge" and all(t.merged for t in tuned):
            adapter.unmerge_adapter()
        elif action == "unload":
            adapter.unload()
        elif action == "merge and unload":
            adapter.merge_and_unload()
    if "unload" in action:
        s.adapters = None
    return f"LoRA {action}"


def copy_both(s: Subject, r: random.Random) -> str | None:
    if s.adapters is not None or s.undo:
        return None  # closures of the changes above hold the models that are copied
    s.models = [copy.deepcopy(m) for m in s.models]
    return "deepcopy"


def accelerate_again(s: Subject, r: random.Random) -> str | None:
    model = s.models[1]
    if any(isinstance(m, clipfast.CLIP) for m in model.modules()):
        return None
    if r.random() < 0.5:
        clipfast.restore(model)
    if any(isinstance(m, Accelerated) for m in model.modules()) and r.random() < 0.3:
        return "restored"
    try:
        clipfast.accelerate(model)
    except ValueError:
        return "accelerate refused"
    return "accelerate again"


def mode(s: Subject, r: random.Random) -> str:
    train = r.random() < 0.5
    for m in s.models:
        m.train(train)
    return "train" if train else "eval"


def grad(s: Subject, r: random.Random) -> str:
    s.grad = not s.grad
    return f"grad {s.grad}"


def reload(s: Subject, r: random.Random) -> str | None:
    if s.adapters is not None:
        return None
    assign = r.random() < 0.5
    for m in s.models:
        state = {k: v * 1.01 if v.is_floating_point() else v for k, v in m.state_dict().items()}
        m.load_state_dict(state, assign=assign)
    return f"load_state_dict(assign={assign})"


@contextmanager
def offloaded(s: Subject) -> Iterator[None]:
    if s.adapters is not None or s.undo or any("forward" in m.__dict__ for m in s.models[0].modules()):
        yield
        return
    grads = [[p.requires_grad for p in m.parameters()] for m in s.models]
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in s.models]
    for m in s.models:
        accelerate.cpu_offload(m, execution_device="cpu")
    try:
        yield
    finally:
        for m, state, wanted in zip(s.models, states, grads, strict=True):
            remove_hook_from_submodules(m)
            for part in m.modules():
                # a bound method stays behind, which would outlive a change of its class
                part.__dict__.pop("forward", None)
            m.load_state_dict(state, assign=True)
            for p, w in zip(m.parameters(), wanted, strict=True):
                p.requires_grad_(w)


ACTIONS: list[Callable[[Subject, random.Random], str | None]] = [
    patch_instance,
    patch_instance,
    patch_class,
    patch_function,
    take_back,
    take_back,
    take_back,
    hook,
    freeze,
    cast,
    replace_module,
    write,
    change_attribute,
    change_attribute,
    lora,
    lora,
    copy_both,
    accelerate_again,
    mode,
    grad,
    reload,
]


def outcome(s: Subject, i: int) -> list[Tensor] | str:
    """Return what a call of a model gives, or the kind of error that it raises."""
    torch.manual_seed(5)
    shortcuts = clipfast.exact_shortcuts(False) if i == 0 else nullcontext()
    # clipfast's own models compute by their modules with gradients
    own = i == 0 and isinstance(s.models[0], clipfast.CLIP)
    try:
        with torch.set_grad_enabled(s.grad or own), shortcuts:
            return tensors_of(s.models[i](**s.inputs(s.dtype)))
    except Exception as error:
        return type(error).__name__


def gradients(s: Subject, i: int, outputs: list[Tensor]) -> dict[str, Tensor]:
    model = s.models[i]
    for p in model.parameters():
        p.grad = None
    generator = torch.Generator().manual_seed(2)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs if t.requires_grad and t.dim() == 2
    )
    if isinstance(loss, Tensor):
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a.isnan(), b.isnan()) and bool(a.isnan().any()):
        a, b = a.nan_to_num(0), b.nan_to_num(0)
    scale = b.detach().abs().max().item() or 1.0
    return (a.detach() - b.detach()).abs().max().item() / scale


def compare(s: Subject, seed: int, done: list[str], with_gradients: bool) -> bool:
    """Assert that both models say the same, and return whether clipfast served."""
    expected, actual = outcome(s, 0), outcome(s, 1)
    story = f"seed {seed}: {' → '.join(done)}"
    if isinstance(expected, str) or isinstance(actual, str):
        assert expected == actual, f"{story}: {expected} and {actual}"
        return False
    served = is_served(s.models[1])
    bound = {torch.float64: 1e-9, torch.float32: 2e-4}[s.dtype] if served or s.adapters else 0.0
    for a, e in zip(actual, expected, strict=True):
        d = difference(a, e)
        assert d <= bound, f"{story}: {d} > {bound}, served {served}"
    if with_gradients and s.grad and s.dtype == torch.float64:
        expected_grads, actual_grads = gradients(s, 0, expected), gradients(s, 1, actual)
        assert actual_grads.keys() == expected_grads.keys(), story
        scale = max((g.abs().max().item() for g in expected_grads.values()), default=1.0)
        for name, g in expected_grads.items():
            d = (actual_grads[name] - g).abs().max().item()
            assert d <= 1e-8 * scale, f"{story}: gradient of {name} differs by {d} of {scale}"
    return served


def is_served(model: nn.Module) -> bool:
    if isinstance(model, clipfast.CLIP):
        return True
    return any(isinstance(m, Accelerated) and m.why_not() is None for m in model.modules())


def run(make: Callable[[], Subject], seed: int, steps: int = 8) -> list[bool]:
    """Do a random sequence of actions and compare after each; return at which steps clipfast served."""
    r = random.Random(seed)
    s, done, served = make(), [], []
    try:
        for _ in range(steps):
            action = r.choice(ACTIONS)
            said = action(s, r)
            if said is None:
                continue
            done.append(said)
            served.append(compare(s, seed, done, with_gradients=r.random() < 0.3))
            if r.random() < 0.08:
                with offloaded(s):
                    compare(s, seed, [*done, "offload"], with_gradients=False)
    finally:
        while s.undo:
            s.undo.pop()[1]()
    return served


COMMON_FUNCTIONS = [(F, "gelu"), (F, "layer_norm"), (F, "scaled_dot_product_attention"), (F, "linear")]
COMMON_ATTRIBUTES: dict[type, list[tuple[str, Any]]] = {
    nn.LayerNorm: [("eps", 0.5), ("eps", 1e-5)],
    nn.GELU: [("approximate", lambda old: "none" if old == "tanh" else "tanh")],
    nn.Dropout: [("p", 0.5), ("p", 0.0)],
    nn.MultiheadAttention: [("num_heads", lambda old: 3 - old if old < 3 else 1), ("dropout", 0.5), ("note", "mine")],
}
