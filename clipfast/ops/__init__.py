"""The functions that CLIP spends its time in, each with a reference, faster implementations and a choice.

Here belong functions of tensors: an op's reference in plain PyTorch, what computes the same sooner, the rule that
chooses, and how the op library and Triton's kernels are called. Layers with Parameters belong to ``clipfast.modules``;
the kernels' own code lies in ``kernels/`` and ``csrc/``. No op knows a layer, a model or a file of data.

The functions are imported here, before anything can import their files, so that ``clipfast.ops.attention`` is
the function however it was imported and not the file of the same name.
"""

from clipfast.ops.attention import attention
from clipfast.ops.bias_gelu import bias_gelu
from clipfast.ops.contrastive_loss import contrastive_loss, send_texts, siglip_loss
from clipfast.ops.dispatch import FallbackWarning, backend, deterministic, explain
from clipfast.ops.distillation_loss import distillation_loss
from clipfast.ops.encoder import release_workspace
from clipfast.ops.layer_norm import add_layer_norm, layer_norm
from clipfast.ops.single_query_attention import single_query_attention

__all__ = [
    "FallbackWarning",
    "add_layer_norm",
    "attention",
    "backend",
    "bias_gelu",
    "contrastive_loss",
    "deterministic",
    "distillation_loss",
    "explain",
    "layer_norm",
    "release_workspace",
    "send_texts",
    "siglip_loss",
    "single_query_attention",
]
