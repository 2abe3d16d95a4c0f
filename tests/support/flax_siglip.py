"""big_vision's arrays of a SigLIP, made from transformers' weights by the rules of its conversion, backwards.

The rules are transformers' convert_siglip_to_hf.py and convert_siglip2_to_hf.py; the names are spelt out here, so that
they are no copy of those that are tested.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

_BLOCK = """
LayerNorm_0/scale layer_norm1.weight
LayerNorm_0/bias layer_norm1.bias
LayerNorm_1/scale layer_norm2.weight
LayerNorm_1/bias layer_norm2.bias
MlpBlock_0/Dense_0/kernel mlp.fc1.weight
MlpBlock_0/Dense_0/bias mlp.fc1.bias
MlpBlock_0/Dense_1/kernel mlp.fc2.weight
MlpBlock_0/Dense_1/bias mlp.fc2.bias
MultiHeadDotProductAttention_0/query/kernel self_attn.q_proj.weight
MultiHeadDotProductAttention_0/query/bias self_attn.q_proj.bias
MultiHeadDotProductAttention_0/key/kernel self_attn.k_proj.weight
MultiHeadDotProductAttention_0/key/bias self_attn.k_proj.bias
MultiHeadDotProductAttention_0/value/kernel self_attn.v_proj.weight
MultiHeadDotProductAttention_0/value/bias self_attn.v_proj.bias
MultiHeadDotProductAttention_0/out/kernel self_attn.out_proj.weight
MultiHeadDotProductAttention_0/out/bias self_attn.out_proj.bias
"""
_REST = """
params/img/embedding/kernel vision_model.embeddings.patch_embedding.weight
params/img/embedding/bias vision_model.embeddings.patch_embedding.bias
params/img/pos_embedding vision_model.embeddings.position_embedding.weight
params/img/Transformer/encoder_norm/scale vision_model.post_layernorm.weight
params/img/Transformer/encoder_norm/bias vision_model.post_layernorm.bias
params/img/MAPHead_0/probe vision_model.head.probe
params/img/MAPHead_0/LayerNorm_0/scale vision_model.head.layernorm.weight
params/img/MAPHead_0/LayerNorm_0/bias vision_model.head.layernorm.bias
params/img/MAPHead_0/MlpBlock_0/Dense_0/kernel vision_model.head.mlp.fc1.weight
params/img/MAPHead_0/MlpBlock_0/Dense_0/bias vision_model.head.mlp.fc1.bias
params/img/MAPHead_0/MlpBlock_0/Dense_1/kernel vision_model.head.mlp.fc2.weight
params/img/MAPHead_0/MlpBlock_0/Dense_1/bias vision_model.head.mlp.fc2.bias
params/img/MAPHead_0/MultiHeadDotProductAttention_0/out/kernel vision_model.head.attention.out_proj.weight
params/img/MAPHead_0/MultiHeadDotProductAttention_0/out/bias vision_model.head.attention.out_proj.bias
params/txt/Embed_0/embedding text_model.embeddings.token_embedding.weight
params/txt/pos_embedding text_model.embeddings.position_embedding.weight
params/txt/Encoder_0/encoder_norm/scale text_model.final_layer_norm.weight
params/txt/Encoder_0/encoder_norm/bias text_model.final_layer_norm.bias
params/txt/head/kernel text_model.head.weight
params/txt/head/bias text_model.head.bias
params/t logit_scale
params/b logit_bias
"""


def arrays(model: nn.Module, heads: int = 2, stacked: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays that big_vision would hold for transformers' ``SiglipModel`` or ``Siglip2Model``.

    Args:
        model: The model, of as many heads in both towers.
        heads: The number of heads H.
        stacked: Whether blocks share arrays with a leading dimension of layers, as flax's scan makes them.
    """
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    made = {new: _flax(new, state[old], heads) for new, old in map(str.split, _REST.strip().splitlines())}
    pool = "params/img/MAPHead_0/MultiHeadDotProductAttention_0"
    for kind, name in (("kernel", "weight"), ("bias", "bias")):
        packed = np.split(state[f"vision_model.head.attention.in_proj_{name}"], 3)
        for part, value in zip(("query", "key", "value"), packed, strict=True):
            made[f"{pool}/{part}/{kind}"] = _flax(f"{pool}/{part}/{kind}", value, heads)
    towers = (("vision_model", "params/img/Transformer"), ("text_model", "params/txt/Encoder_0"))
    for theirs, ours in towers:
        layers = sum(k.startswith(f"{theirs}.encoder.layers.") and k.endswith("fc1.bias") for k in state)
        for new, old in map(str.split, _BLOCK.strip().splitlines()):
            values = [_flax(new, state[f"{theirs}.encoder.layers.{i}.{old}"], heads) for i in range(layers)]
            if stacked:
                made[f"{ours}/encoderblock/{new}"] = np.stack(values)
            else:
                made |= {f"{ours}/encoderblock_{i}/{new}": value for i, value in enumerate(values)}
    return made


def _flax(name: str, value: np.ndarray, heads: int) -> np.ndarray:
    if name.endswith("img/embedding/kernel"):
        # OIHW to HWIO; NaFlex's matrix is transposed alone
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    if name.endswith("img/pos_embedding"):
        # set apart by whoever makes NaFlex's
        return value[None]
    if name.endswith("txt/pos_embedding"):
        return value[None]
    if name.endswith(("query/kernel", "key/kernel", "value/kernel")):
        return value.T.reshape(value.shape[1], heads, -1)
    if name.endswith(("query/bias", "key/bias", "value/bias")):
        return value.reshape(heads, -1)
    if name.endswith("out/kernel"):
        return value.T.reshape(heads, -1, value.shape[0])
    return value.T if name.endswith("kernel") else value


def naflex(made: dict[str, np.ndarray], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return arrays with NaFlex's positions, which lie in a grid."""
    positions = made["params/img/pos_embedding"]
    return made | {"params/img/pos_embedding": positions.reshape(*grid, positions.shape[-1])}


def bfloat16(made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return arrays as NumPy loads what JAX saves in bfloat16: two bytes without a meaning."""
    return {
        k: torch.from_numpy(np.ascontiguousarray(v, np.float32)).bfloat16().view(torch.int16).numpy().view("V2")
        for k, v in made.items()
    }
