"""CLIP: an image tower and a text tower that meet in one space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.models.config import CLIPConfig
from clipfast.modules.initialization import init_as_big_vision
from clipfast.modules.resnet import ModifiedResNet
from clipfast.modules.text import TextTower
from clipfast.modules.vit import ViT

MAX_LOGIT_SCALE = math.log(100)


class CLIP(TextTower):
    """CLIP, whose state dict has the keys of OpenAI's and open_clip's, in the same order.

    Args:
        config: Sizes; :func:`clipfast.create_model` makes a model from a name, a dict or a file.
        init_logit_scale: Where the learned temperature starts, as a logarithm; None is the configuration's.
        init_logit_bias: Where the learned bias of SigLIP's loss starts; None is the configuration's, which may leave it
            out.
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
        init_logit_scale: float | None = None,
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
            None if text.proj_type == "none" else config.embed_dim,
            config.text_approximate,
            text.eos_id,
            text.pool_type,
            text.no_causal_mask,
            text.proj_bias,
            norm_eps=text.norm_eps,
            ls_init_value=text.ls_init_value,
            qkv_bias=text.qkv_bias,
        )
        if config.vision_cfg.pool_type == "map":
            init_as_big_vision(self)
        init_logit_scale = _first(init_logit_scale, config.init_logit_scale, math.log(1 / 0.07))
        init_logit_bias = _first(init_logit_bias, config.init_logit_bias)
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
            text: Token ids ``[B, L]``, as :func:`clipfast.tokenize` gives them: best left in host memory where the
                model is on a GPU, since then nothing has to wait for their lengths.
            normalize: Whether features get unit length.

        Returns:
            Features ``[B, E]``.

        Raises:
            TypeError, ValueError: ``text`` is not as described (values are checked in host memory only).
        """
        features = self._text_features(text)
        return F.normalize(features, dim=-1) if normalize else features

    def transform(self, train: bool = False, **options: Any) -> Callable[..., Any]:
        """Return what makes a PIL picture this model's input, as its weights were trained.

        Args:
            train: Whether a random part of the picture is taken.
            **options: As for :func:`clipfast.image_transform`, or for a tower of any aspect
                :func:`clipfast.naflex_transform`.
        """
        # pictures are read a floor above the models
        from clipfast.data.input_transform import transform_of

        return transform_of(self.config.vision_cfg, train=train, **options)

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
        logits = self._logits(*features)
        return logits, logits.T

    def _logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        logits = self.logit_scale.exp() * image_features @ text_features.T
        return logits if self.logit_bias is None else logits + self.logit_bias

    def forward_intermediates(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_indices: int | Sequence[int] | None = None,
        text_indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize: bool = True,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        image_output_fmt: str = "NCHW",
        image_output_extra_tokens: bool = False,
        text_output_fmt: str = "NLC",
        text_output_extra_tokens: bool = False,
        output_logits: bool = False,
        output_logit_scale_bias: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Return features and what chosen blocks give, with open_clip's arguments and names.

        Args:
            image: ``[B, 3, height, width]`` or None.
            text: ``[B, L]`` or None.
            image_indices: As in :meth:`ViT.forward_intermediates`.
            text_indices: As in :meth:`TextTransformer.forward_intermediates`.
            stop_early: Whether the image tower ends at the last chosen block; the text tower does not, as in open_clip.
            normalize: Whether features get unit length.
            normalize_intermediates: Whether the last LayerNorms are applied to the tokens.
            intermediates_only: Whether features and logits are left out.
            image_output_fmt: ``"NCHW"``, or ``"NLC"`` (ViT only).
            image_output_extra_tokens: Whether the class token is returned as well.
            text_output_fmt: Accepted as in open_clip; tokens come as ``[B, L, W]``.
            text_output_extra_tokens: Accepted as in open_clip; there are no others.
            output_logits: Whether logits are returned as well; wants both inputs.
            output_logit_scale_bias: Whether the scale, exponentiated, and the bias are returned as well.

        Returns:
            A dict of ``image_intermediates``, ``image_intermediates_prefix``, ``image_features``,
            ``text_intermediates``, ``text_features``, ``image_logits``, ``text_logits``, ``logit_scale`` and
            ``logit_bias``, those that were asked for.

        Raises:
            ValueError: Logits without both inputs, or as for the towers.
        """
        normalize, output_logits = (flag and not intermediates_only for flag in (normalize, output_logits))
        if output_logits and (image is None or text is None):
            raise ValueError("output_logits: got an image or a text alone, expected both")
        output: dict[str, Tensor | list[Tensor]] = {}
        if image is not None:
            output |= self.visual.forward_intermediates(
                image,
                image_indices,
                stop_early,
                normalize_intermediates,
                intermediates_only,
                image_output_fmt,
                image_output_extra_tokens,
            )
        if text is not None:
            output |= self._text_intermediates(
                text, text_indices, False, normalize_intermediates, not intermediates_only
            )
        if normalize:
            for name in ("image_features", "text_features"):
                if name in output:
                    output[name] = F.normalize(output[name], dim=-1)
        if output_logits:
            logits = self._logits(output["image_features"], output["text_features"])
            output |= {"image_logits": logits, "text_logits": logits.T}
        if output_logit_scale_bias:
            output["logit_scale"] = self.logit_scale.exp()
            if self.logit_bias is not None:
                output["logit_bias"] = self.logit_bias
        return output

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower but for its last groups; see :meth:`ViT.lock`, :meth:`ModifiedResNet.lock`."""
        self.visual.lock(unlocked_groups, freeze_bn_stats)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower but for its last groups; see :meth:`TextTransformer.lock`."""
        self._lock_text_tower(unlocked_layers, freeze_layer_norm)

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


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


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
            None if vision.proj_type == "none" else config.embed_dim,
            approximate=config.vision_approximate,
            patch_dropout=vision.patch_dropout,
            pool_type=vision.pool_type,
            class_token=vision.class_token,
            reg_tokens=vision.reg_tokens,
            no_ln_pre=vision.no_ln_pre,
            final_ln_after_pool=vision.final_ln_after_pool,
            patch_bias=vision.patch_bias,
            norm_eps=vision.norm_eps,
            ls_init_value=vision.ls_init_value,
            qkv_bias=vision.qkv_bias,
            naflex=vision.naflex,
        )
    return ModifiedResNet(vision.layers, config.embed_dim, vision.heads, vision.image_size, vision.width)
