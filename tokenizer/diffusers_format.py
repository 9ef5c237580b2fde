"""Reading a `VQModel` as diffusers saves it: its config.json as a TokenizerConfig, its tensors under our names.

diffusers 0.42, `VQModel`; it is VQGAN (Esser et al. 2021, arXiv:2012.09841). Nothing of diffusers is needed to read it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import TokenizerConfig
from .pretrained import CONFIG_NAME, check_tensors, read_tensors, unknown_key

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
ATTENTION_BLOCK = "AttnDownEncoderBlock2D"

# What a key that an older config.json lacks meant: the defaults of the class.
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "norm_type": "group",
    "mid_block_add_attention": True,
    # These four change neither tokens nor pictures.
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "lookup_from_codebook": False,
    "force_upcast": False,
}

RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "shortcut"}
ATTENTION = {"group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "project"}
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in older files
OLDER_LAYER = rf"(\.attentions\.\d+)\.({'|'.join(OLDER_ATTENTION)})\."


def read_config(folder: Path, pixel_range: Sequence[float]) -> TokenizerConfig:
    """The TokenizerConfig of the model in a folder of diffusers' VQModel; ValueError where none describes it."""
    values = values_of(folder / CONFIG_NAME)
    widths = values["block_out_channels"]
    check_architecture(values)
    autoencoder = {
        "name": "convolutional",
        "patch_size": 1,
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": values["layers_per_block"],
        "attention_levels": [i for i, kind in enumerate(values["down_block_types"]) if kind == ATTENTION_BLOCK],
        "middle_attention": values["mid_block_add_attention"],
        "latent_channels": values["latent_channels"],
        "norm_groups": values["norm_num_groups"],
    }
    quantizer = {
        "name": "vq",
        "codebook_size": values["num_vq_embeddings"],
        # VQModel multiplies the codebook's term, not the commitment, by its beta, and moves no code but by gradient.
        "codebook_weight": 0.25,
        "commitment_weight": 1.0,
        "revival_threshold": 0.0,
    }
    return TokenizerConfig(
        image_channels=values["in_channels"],
        pixel_range=list(pixel_range),
        codebook_dim=values["latent_channels"] if values["vq_embed_dim"] is None else values["vq_embed_dim"],
        autoencoder=autoencoder,
        quantizer=quantizer,
    )


def values_of(path: Path) -> dict[str, Any]:
    """The values of a VQModel's config.json, those that it lacks filled in."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {CONFIG_NAME}; pass the folder of a VQModel, such as vqvae/")
    try:
        values = json.loads(path.read_text())
        name = values.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not the config of a diffusers model ({error!r})") from None
    if name != "VQModel":
        raise ValueError(f"{path} describes a model of class {name}; this reads diffusers' VQModel alone")
    given = {key: value for key, value in values.items() if not key.startswith("_")}  # its own remarks
    for key in given:
        if key not in DEFAULTS:
            raise unknown_key(key, DEFAULTS, str(path))
    return DEFAULTS | given


def check_architecture(values: dict[str, Any]) -> None:
    """Raise a ValueError that names what our autoencoder has no like of."""
    down, widths = values["down_block_types"], values["block_out_channels"]
    mirrored = [kind.replace("DownEncoder", "UpDecoder") for kind in reversed(down)]
    rules = {
        "norm_type": (values["norm_type"] == "group", "be 'group'"),
        "act_fn": (values["act_fn"] in ("silu", "swish"), "be 'silu'"),
        "out_channels": (values["out_channels"] == values["in_channels"], f"be in_channels={values['in_channels']}"),
        "block_out_channels": (not any(width % widths[0] for width in widths), "be multiples of the first"),
        "down_block_types": (
            len(down) == len(widths) and {"DownEncoderBlock2D", ATTENTION_BLOCK}.issuperset(down),
            f"name DownEncoderBlock2D or {ATTENTION_BLOCK} for each of block_out_channels={widths}",
        ),
        "up_block_types": (values["up_block_types"] == mirrored, f"be {mirrored}: attention at the same levels"),
    }
    for key, (kept, rule) in rules.items():
        if not kept:
            raise ValueError(f"{key}={values[key]!r} of a VQModel must {rule}, to be read here; use diffusers for it")


def read_weights(folder: Path, config: TokenizerConfig, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors that an ImageTokenizer of this config expects, by name, from a folder of diffusers' VQModel.

    Raises FileNotFoundError where it has no safetensors, ValueError where its tensors are not exactly those expected.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}; diffusers' save_pretrained writes it")
    names = {"quantize.embedding.weight": "quantizer.codes.weight"}
    for theirs, ours in layer_names(config.autoencoder).items():
        names |= {f"{theirs}.{kind}": f"autoencoder.{ours}.{kind}" for kind in ("weight", "bias")}
    names = {theirs: ours for theirs, ours in names.items() if ours in expected}
    found = as_named_today(read_tensors(path))
    check_tensors(found, {theirs: expected[ours] for theirs, ours in names.items()}, path)
    # Its codes are where they belong: a training that goes on must not place them anew.
    placed = {
        "quantizer.num_steps": torch.ones(()),
        "quantizer.ema_count": torch.ones(config.quantizer["codebook_size"]),
    }
    return {ours: found[theirs] for theirs, ours in names.items()} | placed


def as_named_today(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of attention, whatever their age, under their present names and as the 1x1 convolutions they are."""
    named = {}
    for name, tensor in tensors.items():
        newer = re.sub(OLDER_LAYER, lambda found: f"{found[1]}.{OLDER_ATTENTION[found[2]]}.", name)
        linear = ".attentions." in name and tensor.ndim == 2
        named[name if newer in tensors else newer] = tensor[..., None, None] if linear else tensor
    return named


def layer_names(autoencoder: dict[str, Any]) -> dict[str, str]:
    """Name of a layer in VQModel -> its name in our autoencoder; also of layers that one layout or the other lacks."""
    num_levels, count = len(autoencoder["channel_multipliers"]), autoencoder["num_res_blocks"]
    names = {"quant_conv": "encoder.to_codes", "post_quant_conv": "decoder.from_codes"}
    for side in ("encoder", "decoder"):
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_norm_out": f"{side}.head.0"}
        names |= block_names(f"{side}.mid_block", f"{side}.middle", 2, autoencoder["middle_attention"])
        names[f"{side}.conv_out"] = f"{side}.head.2"
    for index in range(num_levels):
        # Their decoder counts its levels from the lowest resolution, ours everywhere from the full one.
        down, up = f"encoder.down_blocks.{index}", f"decoder.up_blocks.{num_levels - 1 - index}"
        attends = index in autoencoder["attention_levels"]
        names |= block_names(down, f"encoder.level_{index}", count, attends)
        names |= block_names(up, f"decoder.level_{index}", count + 1, attends)
        names[f"{down}.downsamplers.0.conv"] = f"encoder.downsample_{index + 1}.conv"
        names[f"{up}.upsamplers.0.conv"] = f"decoder.upsample_{index}.conv"
    return names


def block_names(theirs: str, ours: str, count: int, attends: bool) -> dict[str, str]:
    """Names of the layers of `count` residual blocks; where they attend, ours have an attention after each."""
    names, stride = {}, 2 if attends else 1
    for index in range(count):
        names |= {f"{theirs}.resnets.{index}.{a}": f"{ours}.{index * stride}.{b}" for a, b in RESIDUAL.items()}
        if attends:
            names |= {f"{theirs}.attentions.{index}.{a}": f"{ours}.{index * 2 + 1}.{b}" for a, b in ATTENTION.items()}
    return names
