"""Cut the pictures of a data set so that their object lies off centre, by the relevance that an encoder gives.

    python docs/evidence/off-centre/cut.py DATA ENCODER OUT

Writes OUT/train and OUT/test, and OUT/boxes.json: the boxes (top, left, height, width) as fractions of
the pictures. A box has 3/5 of each side. Among those that bring the centre of the object to a quarter
or three quarters of the box, as far as the picture allows, it is the one that moves it most.
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
import smae
from batches import TrainBatches

SIDE = 0.6


@torch.no_grad()
def object_centres(dataset: datasets.Dataset, encoder: smae.SMAE, size: int = 112) -> np.ndarray:
    """The centres (n, 2) of the most relevant quarter of the patches of each picture, as fractions (y, x)."""
    size = size // encoder.patch_size * encoder.patch_size
    grid = (size // encoder.patch_size,) * 2
    places = (torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).flatten(0, 1) + 0.5) / grid[0]
    centres = np.empty((len(dataset), 2))
    for batch in TrainBatches(dataset, size, 128, workers=1).uncropped():
        images = data.normalize(batch.images, encoder.config["mean"], encoder.config["std"])
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder.features(images, encoder.config["depth"] - 1)
        relevance, _ = masks.find_object(features.float(), grid)
        most = relevance.topk(len(places) // 4).indices
        centres[batch.indices] = places[most].mean(dim=1)
    return centres


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
        boxes[name] = off_centre(object_centres(dataset, model))
        found[name] = cut(dataset, boxes[name])
    found.save_to_disk(out)
    (out / "boxes.json").write_text(json.dumps({name: rows.round(3).tolist() for name, rows in boxes.items()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
