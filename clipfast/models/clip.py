"""CLIP: an image tower and a text tower that meet in one space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.models.config import CLIPConfig
from clipfast.modules.resnet import ModifiedResNet
from clipfast.modules.text import TextTower
from clipfast.modules.vit import ViT

MAX_LOGIT_SCALE = math.log(100)


class CLIP(TextTower):
    """CLIP, whose state dict has the keys of OpenAI's and open_clip's, in the same order.

    Args:
        config: Sizes; :func:`clipfast.create_model` makes a model from a name, a dict or a file.
        init_logit_scale: Where the learned temperature starts, as a logarithm.
        init_logit_bias: Where the learned bias of SigLIP's loss starts; None leaves it out.
        output_dict: Whether ``forward`` returns a dict.

    Attributes:
        visual: The image tower, a :class:`~clipfast.ViT` or :class:`~clipfast.ModifiedResNet`.
        logit_scale: The logarithm of the factor between cosine similarities and logits, a scalar Parameter.
        logit_bias: A scalar Parameter or None.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
        output_dict: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.output_dict = output_dict
        self.visual = _image_tower(config)
        text = config.text_cfg
        self._add_text_tower(
            text.context_length,
            text.vocab_size,
            text.width,
            text.layers,
            text.heads,
            text.mlp_ratio,
            config.embed_dim,
            config.approximate,
            text.eos_id,
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Encode images.

        Args:
            image: ``[B, 3, height, width]``, normalised, in the dtype of the weights.
            normalize: Whether features get unit length.

        Returns:
            Features ``[B, E]``.

        Raises:
            TypeError, ValueError: ``image`` is not as described.
        """
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode captions.

        Args:
            text: Token ids ``[B, L]``, as :func:`clipfast.tokenize` gives them.
            normalize: Whether features get unit length.

        Returns:
            Features ``[B, E]``.

        Raises:
            TypeError, ValueError: ``text`` is not as described (values are checked in host memory only).
        """
        features = self._text_features(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor | None, ...] | dict[str, Tensor | None]:
        """Encode a batch for a contrastive loss.

        Args:
            image: ``[B, 3, height, width]`` or None.
            text: ``[B, L]`` or None.

        Returns:
            ``(image_features, text_features, logit_scale)``, features ``[B, E]`` of unit length (None where nothing
            came) and the exponentiated scale; the bias follows where there is one. With ``output_dict``, a dict of
            these names.
        """
        outputs = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias
        return outputs if self.output_dict else tuple(outputs.values())

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits ``[images, texts]`` and ``[texts, images]``."""
        features = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        logits = self.logit_scale.exp() * features[0] @ features[1].T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the scale within 1..100; call it after every optimizer step, as OpenAI and open_clip do."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the training of both towers."""
        self.visual.set_grad_checkpointing(enable)
        self.transformer.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare beside biases and norms."""
        return {"positional_embedding"} | {f"visual.{name}" for name in self.visual.no_weight_decay()}


def _image_tower(config: CLIPConfig) -> nn.Module:
    vision = config.vision_cfg
    if isinstance(vision.layers, int):
        return ViT(
            vision.image_size,
            vision.patch_size,
            vision.width,
            vision.layers,
            vision.heads,
            vision.mlp_ratio,
            config.embed_dim,
            approximate=config.approximate,
            patch_dropout=vision.patch_dropout,
        )
    return ModifiedResNet(vision.layers, config.embed_dim, vision.heads, vision.image_size, vision.width)
