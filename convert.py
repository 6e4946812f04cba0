"""Convert checkpoints of other projects to ``smae.SMAE`` and back.

Reads facebookresearch/mae, transformers' ViTMAE, ViT, DeiT, DINOv2, I-JEPA and MSN, and ViTs with timm's
names (ViT, DeiT, DeiT III, MoCo v3, DINO, DINOv2, SigLIP). Writes timm, transformers and facebookresearch/mae.
``weights`` are state dicts, ``config`` is the JSON beside them, ``arguments`` are those of ``smae.SMAE``.
Imports nothing of this project; ``smae.load`` and ``smae.save`` import it for every format but
their own.

Letters in shapes: ``d`` width, ``p`` patch side, ``c`` channels.
"""

import argparse
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

Weights = dict[str, Tensor]
Folder = tuple[Weights, dict[str, dict]]  # tensors, and the content of JSON files by name

MAE_NAMES = {  # from our names to those of facebookresearch/mae and timm
    "embed": "patch_embed.proj",
    "positions": "pos_embed",
    "registers": "reg_token",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "decoder_positions": "decoder_pos_embed",
    "head": "decoder_pred",
}
TRANSFORMERS_NAMES = {  # from our names to those of transformers' ViTMAE
    "embed": "vit.embeddings.patch_embeddings.projection",
    "cls_token": "vit.embeddings.cls_token",
    "positions": "vit.embeddings.position_embeddings",
    "registers": "vit.embeddings.register_tokens",
    "blocks": "vit.encoder.layer",
    "norm1": "layernorm_before",
    "attention.query": "attention.attention.query",  # these three form our attention.qkv
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
OTHER_NAMES = {  # parts of names in transformers 5 and in its DINOv2: those of ViTMAE in transformers 4
    "vit.layers.": "vit.encoder.layer.",
    "decoder_encoder.layer.": "decoder_layers.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".layer_scale1.lambda1": ".ls1.gamma",
    ".layer_scale2.lambda1": ".ls2.gamma",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
EXTRA_TOKENS = ("dist_token", "vit.embeddings.distillation_token", "register_tokens")  # other names of registers
CLASSIFIER_HEADS = (
    "head.",
    "head_dist.",
    "pre_logits.",
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "vit.pooler.",
    "pooler.",
)
TOKENS, TABLES = ("cls_token", "mask_token"), ("positions", "decoder_positions")
NO_PLAIN_VIT = {  # parts of names, and what our ViT lacks
    "rel_pos": "relative positions",
    "relative_position": "relative positions",
    "rope": "rotary positions",
    "norm_pre": "a norm before its blocks",
    "pre_layrnorm": "a norm before its blocks",
    "fc1_g": "SwiGLU",
    "weights_in": "SwiGLU",
    "mlp.w12": "SwiGLU",
    "q_norm": "norms of queries and keys",
    "lambda_q1": "differential attention",
    "attn_pool": "attention pooling",
    "gamma_1": "layer scale as in BEiT or DeiT III, whose positions cannot be told (timm's deit3 can be loaded)",
}
# timm's architectures whose activation is another one, which shows in their names alone
OTHER_ACTIVATION = r"quickgelu|patch32_siglip|giantopt\w*siglip|large_patch16_siglip\w*512|so400m_patch16_siglip"

# options under "args" in a .pth file; facebookresearch/mae writes norm_pix_loss, to_mae() all
PTH_OPTIONS = (
    "norm_pix_loss",
    "image_size",
    "image_mean",
    "image_std",
    "layer_norm_eps",
    "num_attention_heads",
    "decoder_num_attention_heads",
)

# --------------------------------------------------------------------------------------- .pth files


def read_pth(file: Path) -> tuple[dict, Weights]:
    """Read options and tensors from a file of ``torch.save``, without running code from it.

    Raises ValueError if it holds anything but tensors and plain values, or no tensors.
    """
    try:
        content = unpickle(file)
    except Exception as error:  # torch raises several kinds
        raise ValueError(f"{file} must hold tensors and plain values only: {reason_of(error)}") from None
    config, weights = unwrap(content)
    if not weights:
        raise ValueError(f"{file} holds no model: expected tensors, or a 'model' or 'state_dict'")
    if any(t.layout != torch.strided or t.is_meta or t.is_quantized for t in weights.values()):
        raise ValueError(f"{file} holds sparse, quantized or meta tensors, expected dense ones")
    # with a stride of 0, one stored number stands for many; but an encoder may have several names
    if sum(t.numel() * t.element_size() for t in weights.values()) > 4 * file.stat().st_size:
        raise ValueError(f"{file} claims more numbers than it holds")
    return config, weights


def reason_of(error: Exception) -> str:
    """Why a file was not unpickled, on a line, without torch's advice to switch its checks off."""
    text = " ".join(str(error).split())
    found = re.search(r"GLOBAL ([\w.]+)|(?:global|class|module)[: ]+([\w.]*\.[\w.]+)", text)
    if "Weights only load failed" in text and found:
        return f"it needs the code of {found[1] or found[2]}, which is never run; save its state_dict alone"
    return text.removeprefix("Weights only load failed. ")[:300]


def unpickle(file: Path):
    """Unpickle tensors and plain values. Raises errors of many kinds for anything else."""
    zipped = zipfile.is_zipfile(file)  # the format since PyTorch 1.6
    if zipped:
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
    with torch.serialization.safe_globals([argparse.Namespace]):  # the options of MAE's checkpoints
        # a mapped file takes memory for its real size only, not for sizes it claims
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)


def unwrap(content) -> tuple[dict, Weights]:
    """Find options and tensors, also within "model", "state_dict" or "teacher"."""
    config = {}
    content = content if isinstance(content, dict) else {}
    for _ in range(4):  # a limit, because a dictionary can hold itself
        args = content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        if isinstance(args, dict):
            config |= {name: args[name] for name in PTH_OPTIONS if name in args}
        inner = [content.get(key) for key in ("model", "state_dict", "teacher")]
        content = next((part for part in inner if isinstance(part, dict)), content)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return config, {name: tensor for name, tensor in tensors.items() if isinstance(name, str)}


# -------------------------------------------------------------------------------------- from others


def from_foreign(
    weights: Weights,
    config: dict,
    fixed_positions: Callable[[tuple[int, int], int, int], Tensor],
    heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[dict, Weights]:
    """The arguments and the state dict of ``smae.SMAE`` for the checkpoint of another project.

    ``heads`` and ``image_size``, a side or (H, W), override ``config``. Without either, an encoder
    has heads of 64 channels (widths 1152, 1280, 1408, 1664: 16 heads; the small one of MoCo v3: 12), a
    decoder has heads of 32 channels, and the patch grid is square. The default mean and deviation are
    those of ImageNet.

    Leaves out the heads of classifiers, and position tables equal to ``fixed_positions(grid, width,
    prefix)``, which the model computes. Raises ValueError if the checkpoint is not such a ViT.
    """
    config = config | section(config, "vision_config")
    check_options(config)

    # give the tensors of encoder and decoder our names
    weights = unify_names(weights)
    names, prefix = recognise(weights)
    weights = select(weights, prefix)
    weights = rename(weights, dict.fromkeys(EXTRA_TOKENS, "registers") | {names[name]: name for name in names})
    weights = join_qkv(weights)
    check_supported(weights)
    weights = fold_layer_scale(weights)

    # find the sizes: by names and shapes, else by the configuration, else the usual ones
    arguments = infer_sizes(weights) | read_options(config)
    arguments["heads"] = heads or infer_heads(config, arguments["width"], prefix)
    if width := arguments.get("decoder_width"):
        usual_heads = max(1, width // 32)
        arguments["decoder_heads"] = config.get("decoder_num_attention_heads") or usual_heads
    weights = rename(flatten(weights), {"fc_norm": "norm"})
    image_size = image_size or infer_image_size(weights, config, arguments["patch_size"])
    grid = patch_grid(image_size, arguments["patch_size"])

    # positions are fixed if all tables are, else learned
    prefix = arguments["class_token"] + arguments["registers"]
    weights = add_token_positions(weights, grid, prefix)
    tables = [weights[name] for name in TABLES if name in weights]
    fixed = all(is_fixed(table, grid, prefix, fixed_positions) for table in tables)
    if fixed:
        weights = {name: tensor for name, tensor in weights.items() if name not in TABLES}
    return arguments | dict(image_size=image_size, learned_positions=not fixed), weights


def unify_names(weights: Weights) -> Weights:
    """Rename tensors of transformers as in ViTMAE's pre-training model of version 4, without their common prefix."""
    entry = "embeddings.patch_embeddings.projection.weight"
    places = [name.removesuffix(entry) for name in weights if name.endswith(entry)]
    if not places:
        return weights
    weights = strip_prefix(weights, min(places).removesuffix("vit."))
    bare = re.compile(r"^(?=embeddings\.|encoder\.layer\.|layers\.|layernorm\.)")  # names of a ViTMAEModel
    names = {name: bare.sub("vit.", name) for name in weights}
    for new, old in OTHER_NAMES.items():
        names = {name: unified.replace(new, old) for name, unified in names.items()}
    return {names[name]: tensor for name, tensor in weights.items()}


def recognise(weights: Weights) -> tuple[dict[str, str], str]:
    """The table of names, and the prefix of all names ("module.base_encoder.", often empty).

    Raises ValueError if no patch embedding has a known name.
    """
    names, entry = MAE_NAMES, MAE_NAMES["embed"] + ".weight"
    if TRANSFORMERS_NAMES["embed"] + ".weight" in weights:
        names, entry = TRANSFORMERS_NAMES, TRANSFORMERS_NAMES["embed"] + ".weight"
    prefixes = [name.removesuffix(entry) for name in weights if name.endswith(entry)]
    if not prefixes:
        found = ", ".join(list(weights)[:4])
        raise ValueError(f"not a supported ViT: expected a tensor {entry}, found {found}, ...")
    return names, min(prefixes)


def select(weights: Weights, prefix: str) -> Weights:
    """The float32 tensors of encoder and decoder, without the mask token of an encoder alone."""
    weights = {name: tensor.float() for name, tensor in strip_prefix(weights, prefix).items()}
    weights = leave_out(weights, CLASSIFIER_HEADS)
    if "norm.weight" in weights:
        weights = leave_out(weights, ("fc_norm.",))
    if not any(name.startswith(("decoder_blocks.", "decoder.")) for name in weights):
        weights = leave_out(weights, ("mask_token", "vit.embeddings.mask_token"))
    return weights


def strip_prefix(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names start with ``prefix``, which is removed."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def leave_out(weights: Weights, starts: tuple[str, ...]) -> Weights:
    """Remove the tensors whose names start with any of ``starts``."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(starts)}


def rename(weights: Weights, names: dict[str, str]) -> Weights:
    """Replace whole dotted parts of the tensors' names."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(r"(?<![^.])(" + "|".join(map(re.escape, longest_first)) + r")(?![^.])")
    new_names = {name: pattern.sub(lambda match: names[match[0]], name) for name in weights}
    return {new_names[name]: tensor for name, tensor in weights.items()}


def join_qkv(weights: Weights) -> Weights:
    """Join query, key and value into one tensor where all three are present."""
    weights = dict(weights)
    for name in [name for name in weights if ".attention.query." in name]:
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if all(part in weights for part in parts):
            weights[name.replace("query", "qkv")] = torch.cat([weights.pop(part) for part in parts])
    return weights


def check_supported(weights: Weights):
    """Raise ValueError, with the reason, for ViTs that are not plain ones."""
    for part, what in NO_PLAIN_VIT.items():
        if any(part in name for name in weights):
            raise ValueError(f"not a supported ViT: it has {what}")
    embed, positions = weights["embed.weight"], weights.get("positions", torch.empty(0))
    if embed.ndim != 4 or positions.ndim < 2:
        raise ValueError("not a supported ViT: it lacks absolute positions or a convolution of patches")
    if not embed.numel():
        raise ValueError("not a supported ViT: its patches are empty")


def fold_layer_scale(weights: Weights) -> Weights:
    """Multiply the last matrices of attention and MLP by the layer scale behind them."""
    weights = dict(weights)
    for name in [name for name in weights if re.search(r"\.ls[12]\.gamma$", name)]:
        gamma = weights.pop(name)
        layer = name.replace("ls1.gamma", "attention.out").replace("ls2.gamma", "mlp.2")
        for part in (f"{layer}.weight", f"{layer}.bias"):
            if part in weights:
                weights[part] = weights[part] * gamma.view(-1, *[1] * (weights[part].ndim - 1))
    return weights


def flatten(weights: Weights) -> Weights:
    """Reshape tokens to (d,), registers and tables to (rows, d), the convolution to a linear layer."""
    tokens = {name: weights[name].flatten() for name in TOKENS if name in weights}
    rows = {name: weights[name].flatten(0, -2) for name in (*TABLES, "registers") if name in weights}
    embed = rearrange(weights["embed.weight"], "d c p1 p2 -> d (p1 p2 c)")
    return weights | tokens | rows | {"embed.weight": embed}


def infer_sizes(weights: Weights) -> dict:
    """The sizes given by names and shapes, before :func:`flatten`."""
    width, channels, p, _ = weights["embed.weight"].shape
    mlp_width = 4 * width
    if "blocks.0.mlp.0.weight" in weights:
        mlp_width = len(weights["blocks.0.mlp.0.weight"])
    sizes = dict(
        width=width,
        depth=count_blocks(weights, "blocks."),
        decoder_depth=count_blocks(weights, "decoder_blocks."),
        patch_size=p,
        channels=channels,
        mlp_ratio=mlp_width / width,
        class_token="cls_token" in weights,
        registers=weights["registers"].shape[-2] if "registers" in weights else 0,
        norm_after_mean="fc_norm.weight" in weights,
    )
    if sizes["decoder_depth"] and "decoder_embed.bias" in weights:
        sizes["decoder_width"] = len(weights["decoder_embed.bias"])
    return sizes


def count_blocks(weights: Weights, prefix: str) -> int:
    return len({name.split(".")[0] for name in strip_prefix(weights, prefix)})


def read_options(config: dict) -> dict:
    """The arguments in a configuration that tensors do not show."""
    options = dict(
        norm_eps=config.get("layer_norm_eps", 1e-6),
        normalize_pixels=config.get("norm_pix_loss", True),
    )
    if config.get("do_normalize") is False:
        options |= dict(mean=[0.0] * 3, std=[1.0] * 3)
        return options
    for name in ("mean", "std"):
        if given := config.get(f"image_{name}") or section(config, "pretrained_cfg").get(name):
            options[name] = given
    return options


def check_options(config: dict):
    """Raise ValueError for options of transformers and timm that change the forward pass, and that we lack."""
    model_args = section(config, "model_args")
    options = {name: config.get(name) for name in ("hidden_act", "hidden_activation")}
    for name, value in (options | {"act_layer": model_args.get("act_layer")}).items():
        if value is not None and value not in ("gelu", "gelu_python"):
            raise ValueError(f"not a supported ViT: {name} is {str(value)[:40]!r}, and only gelu is supported")
    architecture = str(config.get("architecture", ""))[:80]
    if "act_layer" not in model_args and re.search(OTHER_ACTIVATION, architecture):
        raise ValueError(f"not a supported ViT: {architecture} has another activation than gelu")
    for kind in (architecture, str(config.get("model_type", ""))[:80]):
        if re.search("rope|dinov3|eva0?2", kind):
            raise ValueError(f"not a supported ViT: {kind} has rotary positions")
    for name in ("norm_layer", "mlp_layer", "block_fn", "attn_layer", "embed_layer", "pos_embed"):
        if model_args.get(name) not in (None, "layernorm", "learn", ""):
            raise ValueError(f"not a supported ViT: {name} is {str(model_args[name])[:40]!r}")
    for name in ("pre_norm", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "use_rot_pos_emb"):
        if model_args.get(name):
            raise ValueError(f"not a supported ViT: it has {name}")
    for name in ("use_swiglu_ffn", "use_mask_token_at_test"):
        if config.get(name):
            raise ValueError(f"not a supported ViT: it has {name}")
    if model_args.get("final_norm") is False:
        raise ValueError("not a supported ViT: it has no final norm")


def infer_heads(config: dict, width: int, prefix: str) -> int:
    """The number of heads: by the configuration, else of 64 channels each, with few exceptions."""
    if heads := config.get("num_attention_heads") or section(config, "model_args").get("num_heads"):
        return heads
    architecture = str(config.get("architecture", ""))
    if width == 384 and prefix.endswith("base_encoder."):  # the small ViT of MoCo v3
        return 12
    if width in (1152, 1280, 1408, 1664) or re.match("vit_base_patch16_gap_224|vit_giantopt", architecture):
        return 16  # the shape-optimised, the huge and two giant ones; a base one of timm
    return max(1, width // 64)


def infer_image_size(weights: Weights, config: dict, p: int):
    """The image size: by the configuration, else that of a square grid of the positions."""
    image_size = config.get("image_size") or section(config, "model_args").get("img_size")
    if image_size is not None:
        return image_size
    rows, cls = len(weights["positions"]), "cls_token" in weights
    prefix = cls + len(weights.get("registers", ()))
    side = next((math.isqrt(rows - k) for k in (0, cls, prefix) if math.isqrt(rows - k) ** 2 == rows - k), None)
    if not side:
        raise ValueError(f"{rows} positions do not form a square grid: pass image_size=(H, W), or --image-size H W")
    return side * p


def patch_grid(image_size, p: int) -> tuple[int, int]:
    """The patch grid (h, w) of an image size. Raises ValueError unless it is a side or (H, W)."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    pair = isinstance(sides, (list, tuple)) and len(sides) == 2
    if not pair or not all(isinstance(side, int) for side in sides):
        received = repr(image_size)[:60]
        raise ValueError(f"image_size must be a side or a pair of sides in pixels, got {received}")
    return sides[0] // p, sides[1] // p


def add_token_positions(weights: Weights, grid: tuple[int, int], prefix: int) -> Weights:
    """Add zero positions for the tokens before the patches that have none: all, or the registers."""
    positions, cls = weights["positions"], "cls_token" in weights
    missing = prefix + grid[0] * grid[1] - len(positions)
    if missing not in (prefix, prefix - cls):
        return weights
    own, rest = positions.split([prefix - missing, grid[0] * grid[1]])
    return weights | dict(positions=torch.cat([own, positions.new_zeros(missing, positions.shape[1]), rest]))


def section(config: dict, name: str) -> dict:
    """The dictionary ``name`` of a configuration, {} if empty or missing."""
    part = config.get(name) or {}
    if not isinstance(part, dict):
        received = f"a {type(part).__name__}"
        raise ValueError(f"{name} in the configuration must be a dictionary, got {received}")
    return part


def is_fixed(table: Tensor, grid: tuple[int, int], prefix: int, fixed_positions: Callable) -> bool:
    """Whether a table equals the one that the model computes, in shape and values."""
    if table.ndim != 2 or len(table) != prefix + grid[0] * grid[1] or table.shape[1] % 4:
        return False
    return torch.equal(table, fixed_positions(grid, table.shape[1], prefix))


# ---------------------------------------------------------------------------------------- to others


def to_mae(weights: Weights, arguments: dict, classifier: dict | None = None) -> dict:
    """The content of a ``.pth`` file of facebookresearch/mae."""
    config = transformers_config(arguments)
    options = {name: value for name, value in config.items() if name in PTH_OPTIONS}
    return {"model": mae_weights(weights, arguments, classifier), "args": options}


def to_timm(weights: Weights, arguments: dict, classifier: dict | None = None) -> Folder:
    """Tensors and JSON files of a timm folder: the encoder, and the head of a classifier.

    ``weights`` and ``arguments`` are those of an SMAE, ``classifier`` those of a Classifier: "classes"
    and "pool".
    """
    weights = leave_out(mae_weights(weights, arguments, classifier), ("decoder_", "mask_token"))
    return weights, {"config.json": timm_config(arguments, classifier)}


def to_transformers(weights: Weights, arguments: dict, classifier: dict | None = None) -> Folder:
    """Tensors and JSON files of a folder of transformers' ViTMAE.

    Raises ValueError for classifiers, models without a CLS token, and images that are not square.
    """
    height, width = arguments["image_size"]
    plain = arguments["class_token"] and not arguments["registers"] and not arguments["norm_after_mean"]
    if classifier or not plain or height != width:
        needs = "a CLS token alone, a square image and no classifier"
        raise ValueError(f"the format transformers needs {needs}: use the format timm")
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


WRITERS = {"timm": to_timm, "transformers": to_transformers, "mae": to_mae}


def mae_weights(weights: Weights, arguments: dict, classifier: dict | None) -> Weights:
    """Tensors and position tables with the names and shapes of facebookresearch/mae and timm."""
    head = {}
    if classifier:
        head = {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
        weights = strip_prefix(weights, "encoder.")
    weights = rename(unflatten(weights, arguments["patch_size"]), MAE_NAMES)
    if norm_after_mean(arguments, classifier):
        weights = rename(weights, {"norm": "fc_norm"})
    return weights | head


def unflatten(weights: Weights, p: int) -> Weights:
    """Reshape tokens to (1, 1, d), position tables to (1, rows, d), embedding to a convolution."""
    tokens = {name: weights[name][None, None] for name in TOKENS if name in weights}
    tables = {name: weights[name][None] for name in (*TABLES, "registers") if name in weights}
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
    config = dict(
        architecture="vit_base_patch16_224",  # any ViT would do: model_args hold all differences
        num_classes=model_args["num_classes"],
        num_features=arguments["width"],
        global_pool=model_args["global_pool"],
        layer_norm_eps=arguments["norm_eps"],  # for from_foreign(); timm always uses 1e-6
        model_args=model_args,
        pretrained_cfg=dict(
            input_size=[arguments["channels"], *arguments["image_size"]],
            mean=arguments["mean"],
            std=arguments["std"],
            interpolation="bicubic",
            num_classes=model_args["num_classes"],
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    return config | (dict(label_names=classifier["classes"]) if classifier else {})


def norm_after_mean(arguments: dict, classifier: dict | None) -> bool:
    """Whether the last norm follows the mean of the patches, as in timm's ``fc_norm``."""
    return classifier["pool"] == "mean" if classifier else arguments["norm_after_mean"]


def timm_arguments(arguments: dict, classifier: dict | None) -> dict:
    """The arguments of timm's VisionTransformer."""
    after_mean = norm_after_mean(arguments, classifier)
    return dict(
        img_size=arguments["image_size"],
        patch_size=arguments["patch_size"],
        in_chans=arguments["channels"],
        embed_dim=arguments["width"],
        depth=arguments["depth"],
        num_heads=arguments["heads"],
        mlp_ratio=arguments["mlp_ratio"],
        class_token=arguments["class_token"],
        reg_tokens=arguments["registers"],
        global_pool="avg" if after_mean or not arguments["class_token"] else "token",
        fc_norm=after_mean,
        num_classes=len(classifier["classes"]) if classifier else 0,
    )
