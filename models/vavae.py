"""VA-VAE (LightningDiT's tokenizer) as a diffusers `AutoencoderKL`: a configuration and a map of names.

The file has the layout of LDM's VQGAN-KL. diffusers' own converters misread it: they silently leave out the attention
inside the lowest level. Hence this map and a strict load. Everything downstream knows only `AutoencoderKL`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.backbone import check_weights
from runtime.errors import UserError, require

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def recognises(weights: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of an LDM autoencoder."""
    return {"encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"} <= weights.keys()


def build(
    weights: Mapping[str, Tensor], source: str, statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
) -> tuple[AutoencoderKL, list[str]]:
    """The autoencoder, and the tensors that were left out (the frozen encoder and the losses of its training).

    `statistics` are the (shift, scale) of its latents by channel, stored in the config as `latents_mean`,
    `latents_std`.

    Raises:
        UserError: tensors missing, left over, or of another shape.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    left_out = Counter(name.split(".")[0] for name in weights if not name.startswith(PARTS))
    try:
        config = read_config(weights)
    except KeyError as error:
        raise UserError(f"{source} is an incomplete VA-VAE: {error.args[0]} is missing") from error
    if statistics is not None:
        shift, scale = statistics
        channels = config["latent_channels"]
        require(len(shift) == channels, f"{source} has {channels} latent channels, the statistics have {len(shift)}")
        config |= {"latents_mean": list(shift), "latents_std": [1 / value for value in scale]}
    # on the meta device nothing is initialised: every tensor comes from the file
    with torch.device("meta"):
        model = AutoencoderKL(**config)
    tensors = _renamed(weights, len(config["block_out_channels"]))
    check_weights(model, tensors, f"a VA-VAE, which {source} should be")
    model.load_state_dict(tensors, assign=True)
    return model.eval(), [f"{name}.* ({count} tensors)" for name, count in left_out.items()]


def _renamed(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The autoencoder's tensors under diffusers' names; 1x1 convolutions of the attention become matrices."""
    tensors = {rename(name, levels): value.float() for name, value in weights.items() if name.startswith(PARTS)}
    return {
        name: value[:, :, 0, 0].contiguous() if value.ndim == 4 and re.search(MATRICES, name) else value.contiguous()
        for name, value in tensors.items()
    }


def read_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration, from shapes and names."""
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down."))
    attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
    layers = len({name.split(".")[4] for name in weights if name.startswith("encoder.down.0.block.")})
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "block_out_channels": [
            weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ],
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attention)],
        "layers_per_block": layers,
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        "sample_size": 256,
        "scaling_factor": 1.0,
    }


MATRICES = r"attentions\.\d+\.to_(q|k|v|out\.0)\.weight$"
RULES = [  # LDM -> diffusers
    (r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"\bdown\.(\d+)\.attn\.", r"down_blocks.\1.attentions."),
    (r"\bdown\.(\d+)\.downsample\.conv\b", r"down_blocks.\1.downsamplers.0.conv"),
    (r"\bup\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"\bup\.(\d+)\.attn\.", r"up_blocks.\1.attentions."),
    (r"\bup\.(\d+)\.upsample\.conv\b", r"up_blocks.\1.upsamplers.0.conv"),
    (r"\bmid\.block_1\b", "mid_block.resnets.0"),
    (r"\bmid\.block_2\b", "mid_block.resnets.1"),
    (r"\bmid\.attn_1\b", "mid_block.attentions.0"),
    (r"(attentions\.\d+)\.norm\b", r"\1.group_norm"),
    (r"(attentions\.\d+)\.([qkv])\b", r"\1.to_\2"),
    (r"(attentions\.\d+)\.proj_out\b", r"\1.to_out.0"),
    (r"\bnin_shortcut\b", "conv_shortcut"),
    (r"\bnorm_out\b", "conv_norm_out"),
]


def rename(name: str, levels: int) -> str:
    """LDM's name of a tensor -> diffusers'.

    LDM counts the decoder's levels from the finest, diffusers from the coarsest.
    """
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"(?<=up_blocks\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)
