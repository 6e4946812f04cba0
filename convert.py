"""Checkpoints of other projects: their tensors and configuration to those of ``smae.SMAE``, and back.

Read: facebookresearch/mae, transformers' ViTMAE, and ViTs in timm's naming (plain ViT, DeiT, MoCo v3,
DINO). Written: timm, transformers, facebookresearch/mae. ``weights`` are state dicts, ``config`` is what
lies beside them as JSON; ``arguments`` are those of ``smae.SMAE``. Imports nothing of this project;
``smae.load`` and ``smae.save`` import it when they meet another format than their own.

Letters in shapes: ``d`` width, ``p`` patch side, ``c`` channels, ``n`` patches.
"""

import argparse
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Weights = dict[str, Tensor]

MAE_NAMES = {  # our names: those of facebookresearch/mae and of timm
    "embed": "patch_embed.proj",
    "positions": "pos_embed",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "decoder_positions": "decoder_pos_embed",
    "head": "decoder_pred",
}
TRANSFORMERS_NAMES = {  # our names: those of transformers' ViTMAE
    "embed": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "positions": "vit.embeddings.position_embeddings",
    "blocks": "vit.encoder.layer",
    "norm1": "layernorm_before",
    "attention.query": "attention.attention.query",  # query, key and value make up our attention.qkv
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.0": "intermediate.dense",
    "mlp.2": "output.dense",
    "norm": "vit.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "mask_token": "decoder.mask_token",
    "decoder_positions": "decoder.decoder_pos_embed",
    "decoder_blocks": "decoder.decoder_layers",
    "decoder_norm": "decoder.decoder_norm",
    "head": "decoder.decoder_pred",
}
CLASSIFIER_HEADS = ("head.", "head_dist.", "pre_logits.", "classifier.", "vit.pooler.", "pooler.")
TOKENS, TABLES = ("cls_token", "mask_token"), ("positions", "decoder_positions")

# Options that a .pth file may hold under "args": norm_pix_loss by facebookresearch/mae, all by us
PTH_OPTIONS = (
    "norm_pix_loss",
    "image_size",
    "image_mean",
    "image_std",
    "layer_norm_eps",
    "num_attention_heads",
    "decoder_num_attention_heads",
)

# ------------------------------------------------------------------------------------------ .pth files


def read_pth(file: Path) -> tuple[dict, Weights]:
    """The options and tensors in a file by ``torch.save``. Runs nothing that the file holds.

    Raises ValueError if it holds anything but tensors and plain values, or no tensors.
    """
    try:
        content = unpickle(file)
    except Exception as error:  # torch has no common one
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} is not a file of tensors alone: {reason}") from None
    config, weights = unwrap(content)
    if not weights:
        raise ValueError(f"{file} holds no model: neither tensors nor a 'model' or 'state_dict' of them")
    if any(t.layout != torch.strided or t.is_meta or t.is_quantized for t in weights.values()):
        raise ValueError(f"{file} holds tensors that are sparse, quantized or without numbers")
    # a stride of 0 shows one stored number as many
    if sum(t.numel() * t.element_size() for t in weights.values()) > file.stat().st_size:
        raise ValueError(f"{file} claims more numbers than it holds")
    return config, weights


def unpickle(file: Path):
    """What ``torch.save`` wrote, if it is tensors and plain values alone. Raises ValueError and others."""
    zipped = zipfile.is_zipfile(file)  # as since PyTorch 1.6
    if zipped:
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
    with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's checkpoints hold their options
        # mapped, the file takes no memory for sizes that it only claims
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)


def unwrap(content) -> tuple[dict, Weights]:
    """Options and tensors in nested dictionaries: under "model", "state_dict" or "teacher", if any."""
    config = {}
    content = content if isinstance(content, dict) else {}
    for _ in range(4):  # not for ever: a dictionary can hold itself
        args = content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        if isinstance(args, dict):
            config |= {name: args[name] for name in PTH_OPTIONS if name in args}
        inner = [content[key] for key in ("model", "state_dict", "teacher") if isinstance(content.get(key), dict)]
        content = inner[0] if inner else content
    tensors = {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}
    return config, tensors


# ------------------------------------------------------------------------------------------ from others


def from_foreign(
    weights: Weights,
    config: dict,
    fixed_positions: Callable[[tuple[int, int], int, int], Tensor],
    heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[dict, Weights]:
    """Arguments and state dict of ``smae.SMAE`` for the checkpoint of another project.

    ``heads`` and ``image_size``, a side or (H, W), overrule ``config``. Without either, an encoder has
    heads of 64 channels (width 1280: 80; the small one of MoCo v3: 32), a decoder has heads of 32, and
    the patch grid is square. Without mean and deviation, images are normalised as ImageNet's.

    Leaves out the heads of classifiers, and position tables that equal ``fixed_positions(grid, width,
    prefix)``: the model computes those. Raises ValueError if the checkpoint is not such a ViT.
    """
    weights = unify_names(weights)
    names, prefix = recognise(weights)
    weights = select(weights, prefix)
    weights = rename(weights, {theirs: ours for ours, theirs in names.items()})
    weights = join_qkv(weights)
    check_supported(weights)
    patch_shape = weights["embed.weight"].shape
    weights = flatten(weights)

    image_size = image_size or infer_image_size(weights, config, patch_shape[2])
    grid = patch_grid(image_size, patch_shape[2])
    weights = add_class_position(weights, grid)
    arguments = infer_sizes(weights, patch_shape) | read_options(config)
    arguments |= dict(image_size=image_size, heads=heads or infer_heads(config, patch_shape[0], prefix))
    if arguments["decoder_depth"] and "decoder_embed.bias" in weights:
        arguments |= infer_decoder(weights, config)

    tables = [name for name in TABLES if name in weights]
    if all(is_fixed(weights[name], grid, arguments["class_token"], fixed_positions) for name in tables):
        return arguments, {name: tensor for name, tensor in weights.items() if name not in tables}
    return arguments | dict(learned_positions=True), weights


def unify_names(weights: Weights) -> Weights:
    """The names of ViTMAE as a pre-training model has them, and as transformers 4 writes them."""
    bare = re.compile(r"^(?=embeddings\.|encoder\.layer\.|layernorm\.)")  # of an encoder alone
    weights = {bare.sub("vit.", name): tensor for name, tensor in weights.items()}
    return {name.replace("decoder_encoder.layer.", "decoder_layers."): t for name, t in weights.items()}


def recognise(weights: Weights) -> tuple[dict[str, str], str]:
    """The table of names, and what stands before each name ("module.base_encoder.", often nothing).

    Raises ValueError unless there are patch embeddings of a known name.
    """
    names, entry = MAE_NAMES, MAE_NAMES["embed"] + ".weight"
    if TRANSFORMERS_NAMES["embed"] + ".weight" in weights:
        names, entry = TRANSFORMERS_NAMES, TRANSFORMERS_NAMES["embed"] + ".weight"
    prefixes = [name.removesuffix(entry) for name in weights if name.endswith(entry)]
    if not prefixes:
        found = ", ".join(list(weights)[:4])
        raise ValueError(f"not a ViT known here: expected a tensor {entry}, found {found}, ...")
    return names, min(prefixes)


def select(weights: Weights, prefix: str) -> Weights:
    """The tensors of encoder and decoder, float32, without ``prefix``; an ``fc_norm`` replaces a missing norm."""
    weights = {n.removeprefix(prefix): t.float() for n, t in weights.items() if n.startswith(prefix)}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(CLASSIFIER_HEADS)}
    if "norm.weight" not in weights:
        weights = rename(weights, {"fc_norm": "norm"})
    return {name: tensor for name, tensor in weights.items() if not name.startswith("fc_norm.")}


def rename(weights: Weights, names: dict[str, str]) -> Weights:
    """Replace whole dotted parts of the tensors' names."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(r"(?<![^.])(" + "|".join(map(re.escape, longest_first)) + r")(?![^.])")
    return {pattern.sub(lambda match: names[match[0]], name): tensor for name, tensor in weights.items()}


def join_qkv(weights: Weights) -> Weights:
    """Join query, key and value to one tensor, wherever all three are present."""
    weights = dict(weights)
    for name in [name for name in weights if ".attention.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in weights for part in parts):
            weights[name.replace("query", "qkv")] = torch.cat([weights.pop(part) for part in parts])
    return weights


def check_supported(weights: Weights):
    """Raise ValueError for ViTs without absolute positions, with other patch embeddings or more tokens."""
    embed, positions = weights["embed.weight"], weights.get("positions", torch.empty(0))
    if embed.ndim != 4 or positions.ndim < 2:
        raise ValueError("not a ViT known here: it has no absolute positions, or no convolution of patches")
    if not embed.numel():
        raise ValueError("not a ViT known here: its patches hold nothing")
    if others := {"dist_token", "reg_token"} & weights.keys():
        raise ValueError(f"it has tokens that are not known here: {', '.join(others)}")


def flatten(weights: Weights) -> Weights:
    """Tokens to (d,), position tables to (rows, d), the convolution of patches to a linear layer."""
    tokens = {name: weights[name].flatten() for name in TOKENS if name in weights}
    tables = {name: weights[name].flatten(0, -2) for name in TABLES if name in weights}
    embed = rearrange(weights["embed.weight"], "d c p1 p2 -> d (p1 p2 c)")
    return weights | tokens | tables | {"embed.weight": embed}


def infer_image_size(weights: Weights, config: dict, p: int):
    """The image size in the configuration, else that of a square grid with as many positions."""
    told = config.get("image_size") or section(config, "model_args").get("img_size")
    if told is not None:
        return told
    rows, cls = len(weights["positions"]), "cls_token" in weights
    side = math.isqrt(rows)
    if rows not in (side * side, side * side + cls):
        raise ValueError(f"{rows} positions do not form a square grid: give image_size=(H, W)")
    return side * p


def patch_grid(image_size, p: int) -> tuple[int, int]:
    """The patch grid (h, w) of an image size, a side or (H, W). Raises ValueError if it is neither."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    if not pair or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"image_size must be a side or a pair of sides, in pixels, got {repr(image_size)[:60]}")
    return sides[0] // p, sides[1] // p


def add_class_position(weights: Weights, grid: tuple[int, int]) -> Weights:
    """Give a CLS token without a position of its own the position zero."""
    positions = weights["positions"]
    if "cls_token" in weights and len(positions) == grid[0] * grid[1]:
        positions = F.pad(positions, (0, 0, 1, 0))
    return weights | dict(positions=positions)


def infer_sizes(weights: Weights, patch_shape: tuple[int, int, int, int]) -> dict:
    """The sizes of an encoder, and the depth of its decoder, by the shapes and names of its tensors."""
    width, channels, p, _ = patch_shape
    mlp = weights.get("blocks.0.mlp.0.weight")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    decoder_blocks = {name.split(".")[1] for name in weights if name.startswith("decoder_blocks.")}
    return dict(
        width=width,
        depth=len(blocks),
        decoder_depth=len(decoder_blocks),
        patch_size=p,
        channels=channels,
        mlp_ratio=4.0 if mlp is None else len(mlp) / width,
        class_token="cls_token" in weights,
    )


def infer_heads(config: dict, width: int, prefix: str) -> int:
    """The heads in the configuration, else the usual ones of 64 channels, with two exceptions."""
    told = config.get("num_attention_heads") or section(config, "model_args").get("num_heads")
    if width == 384 and prefix.endswith("base_encoder."):  # the small ViT of MoCo v3
        return told or 12
    return told or {1280: 16}.get(width, max(1, width // 64))


def infer_decoder(weights: Weights, config: dict) -> dict:
    """Width and heads of a decoder; of 32 channels each, unless the configuration tells their number."""
    width = len(weights["decoder_embed.bias"])
    return dict(decoder_width=width, decoder_heads=config.get("decoder_num_attention_heads") or max(1, width // 32))


def read_options(config: dict) -> dict:
    """The arguments in a configuration that tensors do not show."""
    options = dict(norm_eps=config.get("layer_norm_eps", 1e-6), normalize_pixels=config.get("norm_pix_loss", True))
    for name in ("mean", "std"):
        if told := config.get(f"image_{name}") or section(config, "pretrained_cfg").get(name):
            options[name] = told
    return options


def section(config: dict, name: str) -> dict:
    """The dictionary ``name`` in a configuration, {} without one. Raises ValueError for anything else."""
    part = config.get(name) or {}
    if not isinstance(part, dict):
        raise ValueError(f"the configuration must hold a dictionary as {name}, got a {type(part).__name__}")
    return part


def is_fixed(table: Tensor, grid: tuple[int, int], prefix: int, fixed_positions: Callable) -> bool:
    """Whether a position table is the one that the model computes. Computes none of another shape."""
    if table.ndim != 2 or len(table) != prefix + grid[0] * grid[1] or table.shape[1] % 4:
        return False
    return torch.equal(table, fixed_positions(grid, table.shape[1], prefix))


# ------------------------------------------------------------------------------------------ to others


def to_mae(weights: Weights, arguments: dict, classifier: dict | None = None) -> dict:
    """The content of a ``.pth`` file of facebookresearch/mae."""
    options = transformers_config(arguments)
    options = {name: value for name, value in options.items() if name in PTH_OPTIONS}
    return {"model": mae_weights(weights, arguments, classifier), "args": options}


def to_timm(weights: Weights, arguments: dict, classifier: dict | None = None) -> tuple[Weights, dict[str, dict]]:
    """Tensors and JSON files of a timm folder, without a decoder."""
    weights = mae_weights(weights, arguments, classifier)
    decoder = ("decoder_", "mask_token")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(decoder)}
    return weights, {"config.json": timm_config(arguments, classifier)}


def to_transformers(
    weights: Weights, arguments: dict, classifier: dict | None = None
) -> tuple[Weights, dict[str, dict]]:
    """Tensors and JSON files of a folder of transformers' ViTMAE. Raises ValueError for what it cannot be."""
    height, width = arguments["image_size"]
    if classifier or not arguments["class_token"] or height != width:
        raise ValueError("ViTMAE of transformers has a CLS token, a square grid, no classifier: write timm instead")
    weights = split_qkv(unflatten(weights, arguments["patch_size"]))
    config = transformers_config(arguments)
    processor = dict(
        image_processor_type="ViTImageProcessor",
        size=dict(height=height, width=width),
        image_mean=config.pop("image_mean"),
        image_std=config.pop("image_std"),
    )
    texts = {"config.json": config | dict(image_size=height), "preprocessor_config.json": processor}
    return rename(weights, TRANSFORMERS_NAMES), texts


WRITERS = {"timm": to_timm, "transformers": to_transformers, "mae": to_mae}  # by the name of the format


def mae_weights(weights: Weights, arguments: dict, classifier: dict | None) -> Weights:
    """Our tensors, position tables included, in the names and shapes of facebookresearch/mae and timm."""
    head = {}
    if classifier:
        head = {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
        weights = {n.removeprefix("encoder."): t for n, t in weights.items() if n.startswith("encoder.")}
    weights = rename(unflatten(weights, arguments["patch_size"]), MAE_NAMES)
    if classifier and classifier["pool"] == "mean":
        weights = rename(weights, {"norm": "fc_norm"})
    return weights | head


def unflatten(weights: Weights, p: int) -> Weights:
    """Tokens to (1, 1, d), position tables to (1, rows, d), the embedding of patches to a convolution."""
    tokens = {name: weights[name][None, None] for name in TOKENS if name in weights}
    tables = {name: weights[name][None] for name in TABLES if name in weights}
    embed = rearrange(weights["embed.weight"], "d (p1 p2 c) -> d c p1 p2", p1=p, p2=p).contiguous()
    return weights | tokens | tables | {"embed.weight": embed}


def split_qkv(weights: Weights) -> Weights:
    """Split each joint tensor into query, key and value."""
    weights = dict(weights)
    for name in [name for name in weights if ".qkv." in name]:
        for part, tensor in zip(("query", "key", "value"), weights.pop(name).chunk(3)):
            weights[name.replace("qkv", part)] = tensor.contiguous()
    return weights


def transformers_config(arguments: dict) -> dict:
    """The ``config.json`` of transformers' ViTMAE, with the images' size, mean and deviation."""
    config = dict(
        model_type="vit_mae",
        architectures=["ViTMAEForPreTraining" if arguments["decoder_depth"] else "ViTMAEModel"],
        image_size=arguments["image_size"],
        image_mean=arguments["mean"],
        image_std=arguments["std"],
        patch_size=arguments["patch_size"],
        num_channels=arguments["channels"],
        hidden_size=arguments["width"],
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["heads"],
        intermediate_size=round(arguments["width"] * arguments["mlp_ratio"]),
        hidden_act="gelu",
        layer_norm_eps=arguments["norm_eps"],
        qkv_bias=True,
        norm_pix_loss=arguments["normalize_pixels"],
    )
    if not arguments["decoder_depth"]:
        return config
    return config | dict(
        decoder_hidden_size=arguments["decoder_width"],
        decoder_num_hidden_layers=arguments["decoder_depth"],
        decoder_num_attention_heads=arguments["decoder_heads"],
        decoder_intermediate_size=round(arguments["decoder_width"] * arguments["mlp_ratio"]),
    )


def timm_config(arguments: dict, classifier: dict | None) -> dict:
    """The ``config.json`` of a timm folder."""
    model_args = timm_arguments(arguments, classifier)
    classes = dict(num_classes=model_args["num_classes"])
    config = dict(
        architecture="vit_base_patch16_224",  # any ViT: model_args hold every difference
        **classes,
        num_features=arguments["width"],
        global_pool=model_args["global_pool"],
        layer_norm_eps=arguments["norm_eps"],  # for from_foreign(); timm has 1e-6
        model_args=model_args,
        pretrained_cfg=dict(
            input_size=[arguments["channels"], *arguments["image_size"]],
            mean=arguments["mean"],
            std=arguments["std"],
            interpolation="bicubic",
            **classes,
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    return config | (dict(label_names=classifier["classes"]) if classifier else {})


def timm_arguments(arguments: dict, classifier: dict | None) -> dict:
    """The arguments of timm's VisionTransformer."""
    mean = classifier["pool"] == "mean" if classifier else not arguments["class_token"]
    return dict(
        img_size=arguments["image_size"],
        patch_size=arguments["patch_size"],
        in_chans=arguments["channels"],
        embed_dim=arguments["width"],
        depth=arguments["depth"],
        num_heads=arguments["heads"],
        mlp_ratio=arguments["mlp_ratio"],
        class_token=arguments["class_token"],
        global_pool="avg" if mean else "token",
        fc_norm=bool(classifier) and mean,
        num_classes=len(classifier["classes"]) if classifier else 0,
    )
