"""Contrastive losses, forward and backward, over the batch: time should grow with its square, memory with itself.

pytest benchmarks/test_contrastive_loss.py --scale full
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, absent, by_scale, dtype_name, measure, on_backend, op_facts

from clipfast import ops
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row

WIDTH = 512
SCALE, BIAS = 14.3, -10.0
# to what a B×B loss can hold: the gradients of 32,768² logits are 4 GB each
BATCHES = by_scale(
    smoke=[64, 256],
    short=[512, 1024, 2048, 4096],
    full=[512, 1024, 2048, 4096, 8192, 16384],
    gpu=[2048, 4096, 8192, 16384, 32768],
)
BFLOAT16 = by_scale(smoke=BATCHES[-1:], short=BATCHES[-1:], full=BATCHES, gpu=BATCHES)
CASES = [(batch, torch.float32) for batch in BATCHES] + [(batch, torch.bfloat16) for batch in BFLOAT16]


def open_clips(name):
    if reason := absent("open_clip", "torchvision"):
        return reason
    from open_clip import loss

    return getattr(loss, name)()


def linear_cross_entropy():
    """PyTorch's own loss in chunks, which has one direction."""
    if not hasattr(F, "linear_cross_entropy"):
        return "not in this PyTorch"

    def both_directions(image, text, scale):
        labels = torch.arange(image.shape[0], device=image.device)
        rows = F.linear_cross_entropy(scale * image, text, labels)
        return (rows + F.linear_cross_entropy(scale * text, image, labels)) / 2

    return both_directions


def memeffs():
    if reason := absent("memeff", gpu=True):
        return reason
    from memeff import MemoryEfficientCLIPLoss

    # its temperature is a number: the gradient of logit_scale is not computed
    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda image, text, scale: loss(image, text) + 0 * scale


def inf_cls():
    if reason := absent("inf_cl", gpu=True):
        return reason
    from inf_cl import cal_flash_loss

    def both_directions(image, text, scale):
        return (cal_flash_loss(image, text, scale=scale) + cal_flash_loss(text, image, scale=scale)) / 2

    return lambda image, text, scale: both_directions(image, text, scale).mean()


def siglip_kernels():
    if reason := absent("siglip_kernel", gpu=True):
        return reason
    from siglip_kernel import fused_siglip_loss

    return lambda image, text, scale: fused_siglip_loss(image, text, scale.log(), torch.tensor(BIAS, device=DEVICE))


def step(loss):
    """Return a call that gives the loss and the gradients of the features; that of the scale is computed too."""
    if isinstance(loss, str):
        return loss

    def run(image, text, scale):
        image, text, scale = (t.detach().requires_grad_() for t in (image, text, scale))
        value = loss(image, text, scale)
        return value.detach(), *torch.autograd.grad(value, (image, text, scale))[:2]

    return run


def features(batch, dtype):
    """Pairs as early in training, with a cosine of about 0.25."""
    image, noise = torch.randn(2, batch, WIDTH, device=DEVICE)
    text = F.normalize(image + 4 * noise, dim=1).to(dtype)
    return F.normalize(image, dim=1).to(dtype), text, torch.tensor(SCALE, device=DEVICE, dtype=dtype)


def run(benchmark, op, batch, dtype, sides, inputs):
    """Measure one of the two losses."""
    exact_inputs = tuple(t.double() for t in inputs)
    backend = "reference" if batch <= 8192 else "torch"  # in chunks where the logits would not fit
    exact = on_backend(backend, sides["clipfast"])(*exact_inputs)
    # DESIGN: the value's scale is 1, and that of the features' gradients s/B
    scales = [max(1.0, float(exact[0])), SCALE / batch, SCALE / batch]
    name = dtype_name(dtype)
    row = Row(
        op="contrastive_loss",
        name=f"{op}, forward and backward, B = {batch}, D = {WIDTH}, {name}",
        label=f"{'SigLIP, ' * (op == 'siglip_loss')}B = {batch:,}, {name}",
        direction="forward and backward",
        dtype=name,
        unit="pairs",
        items=batch,
        flops=8 * batch**2 * WIDTH,
        bytes=4 * batch * WIDTH * dtype.itemsize,
        series=op.replace("_", " ") + f", {name}",
        axis="batch",
        at=batch,
        law={"time": 2, "memory": 1},
        facts=op_facts(op, *inputs, backward=True),
    )
    measure(benchmark, row, sides, [inputs], oracle=Oracle(exact, "PyTorch", scales), saves=True)


@pytest.mark.parametrize(("batch", "dtype"), CASES, ids=str)
def test_contrastive_loss(batch, dtype, benchmark):
    sides = {
        "clipfast": step(ops.contrastive_loss),
        "PyTorch": step(on_backend("reference", ops.contrastive_loss)),
        "open_clip": step(open_clips("ClipLoss")),
        "F.linear_cross_entropy": step(linear_cross_entropy()),
        "memeff": step(memeffs()),
        "inf-cl": step(inf_cls() if dtype == torch.float32 else "float32 only"),
    }
    run(benchmark, "contrastive_loss", batch, dtype, sides, features(batch, dtype))


@pytest.mark.parametrize("batch", by_scale(smoke=BATCHES[-1:], short=[2048], full=BATCHES, gpu=BATCHES))
def test_siglip_loss(batch, benchmark):
    def ours(image, text, scale):
        return ops.siglip_loss(image, text, scale, logit_bias=BIAS)

    theirs = open_clips("SigLipLoss")
    sides = {
        "clipfast": step(ours),
        "PyTorch": step(on_backend("reference", ours)),
        "open_clip": step(
            theirs if isinstance(theirs, str) else lambda i, t, s: theirs(i, t, s, torch.tensor(BIAS, device=DEVICE))
        ),
        "siglip-kernel": step(siglip_kernels()),
    }
    run(benchmark, "siglip_loss", batch, torch.float32, sides, features(batch, torch.float32))
