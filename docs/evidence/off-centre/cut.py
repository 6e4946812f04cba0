"""Cut the pictures of a data set so that their object lies off centre, by the relevance that an encoder gives.

    python docs/evidence/off-centre/cut.py DATA ENCODER OUT

Writes OUT/train and OUT/test, and OUT/boxes.json: the boxes (top, left, height, width) as fractions of
the pictures. Prints how well the centre of the picture predicts the object, before and after. A box
has 3/5 of each side. Among those that bring the centre of the object to a quarter or three quarters of
the box, as far as the picture allows, it is the one that moves it most.
"""

import io
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import data
import masks
import measures
import smae
from batches import TrainBatches

SIDE = 0.6


GRID = (8, 8)


@torch.no_grad()
def find_objects(dataset: datasets.Dataset, encoder: smae.SMAE) -> tuple[torch.Tensor, torch.Tensor]:
    """Relevance (n, 64) of the patches of whole pictures, and the side of the object."""
    relevance, side = torch.empty(len(dataset), 64), torch.empty(len(dataset), 64, dtype=torch.bool)
    for batch in TrainBatches(dataset, GRID[0] * encoder.patch_size, 128, workers=1).uncropped():
        images = data.normalize(batch.images, encoder.config["mean"], encoder.config["std"])
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder.features(images, encoder.config["depth"] - 1)
        relevance[batch.indices], side[batch.indices] = masks.find_object(features.float(), GRID)
    return relevance, side


def object_centres(relevance: torch.Tensor) -> np.ndarray:
    """The centres (n, 2) of the most relevant quarter of the patches (n, 64), as fractions (y, x)."""
    rows = (torch.arange(GRID[0]) + 0.5) / GRID[0]
    places = torch.cartesian_prod(rows, rows)
    return places[relevance.topk(16).indices].mean(dim=1).double().numpy()


def centre_auc(side: torch.Tensor) -> float:
    """The rank-AUC of the centre of the picture against the side of the object (n, 64)."""
    return measures.rank_auc(masks.centrality(GRID).expand(len(side), -1), side.float()).nanmean().item()


def off_centre(centres: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) that have the centres of objects (n, 2) off theirs."""
    starts = np.clip(centres[..., None] - SIDE * np.array([0.25, 0.75]), 0, 1 - SIDE)  # (n, 2, 2 choices)
    distance = np.abs(centres[..., None] - starts - SIDE / 2)
    tie = np.isclose(distance[..., :1], distance[..., 1:])[..., 0]
    choice = np.where(tie, np.random.default_rng(0).integers(2, size=tie.shape), distance.argmax(-1))
    start = np.take_along_axis(starts, choice[..., None], -1)[..., 0]
    return np.hstack([start, np.full_like(start, SIDE)])


def cut(dataset: datasets.Dataset, boxes: np.ndarray) -> datasets.Dataset:
    def crop(record: dict, index: int) -> dict:
        picture = data.decode(record["image"])
        top, left, height, width = boxes[index]
        w, h = picture.size
        picture = picture.crop((round(left * w), round(top * h), round((left + width) * w), round((top + height) * h)))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return {"image": dict(bytes=buffer.getvalue(), path=None)}

    return dataset.map(crop, with_indices=True).cast_column("image", datasets.Image())


def main(source: str, encoder: str, out: Path):
    model, boxes = smae.load(encoder).eval(), {}
    found = datasets.DatasetDict()
    for split, name in (("train", "train"), ("validation", "test")):
        dataset = data.load_images(source, split)
        relevance, side = find_objects(dataset, model)
        boxes[name] = off_centre(object_centres(relevance))
        found[name] = cut(dataset, boxes[name])
        few = range(0, len(dataset), 20)
        _, side_after = find_objects(found[name].cast_column("image", datasets.Image(decode=False)).select(few), model)
        print(f"{name}: AUC of the centre {centre_auc(side[::20]):.3f}, after {centre_auc(side_after):.3f}")
    found.save_to_disk(out)
    (out / "boxes.json").write_text(json.dumps({name: rows.round(3).tolist() for name, rows in boxes.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
