"""How well the guides of an experiment find objects when they start to guide: rank-AUC of relevance, whole pictures.

    python docs/evidence/guides.py OUT DATA [SPLIT]      # OUT of reproduce.py; DATA with a column "mask"

Each arm's guide works on the weights of the random run of the same seed, from which the arm goes on. Left out are
guides that are columns of the data, the truth itself, and those whose start is auto.
Writes OUT/guides.json: means over the pictures, by arm and seed.
"""

import json
import shlex
import sys
from pathlib import Path

import torch
from einops import reduce

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import contest
import data
import measures
import reproduce
import smae
import train
from guide import mask_column


@torch.no_grad()
def rank_auc(options: list[str], checkpoint: Path, pictures: contest.Pictures) -> float:
    args = train.parse_arguments(options)
    train.fill_defaults(args)
    model = smae.load(checkpoint).eval()
    guide = train.build_guide(args, model)
    found = []
    for images in pictures.images.split(64):
        with torch.autocast("cpu", torch.bfloat16):
            relevance, _ = guide.relevance(data.normalize(images, *model.statistics))
        found.append(relevance.float())
    relevance = torch.cat(found)
    if args.guide_shuffle:  # of a picture of another kind
        relevance = relevance.roll(len(relevance) // 2, dims=0)
    h, w = model.grid(pictures.images)
    share = reduce(pictures.truth, "b (h y) (w x) -> b (h w)", "mean", h=h, w=w)
    return 100 * measures.rank_auc(relevance, share).nanmean().item()


def main(out: Path, objects: str, split: str = "train"):
    settings = json.loads((out / "settings.json").read_text())
    size = train.parse_arguments(shlex.split(settings["pretrain"])).image_size
    pictures = contest.Pictures(data.load_images(objects, split), "mask", "", "", size)
    file = out / "guides.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    for arm, options in settings["arms"].items():
        for seed in settings["seeds"]:
            start = f"--epochs {settings['epochs']} --guide-start {reproduce.guide_start(settings['epochs'])}"
            options_of_run = shlex.split(f"{start} {settings['pretrain']} {options}")
            args = train.parse_arguments([*options_of_run, "--dataset", settings["dataset"], "--preload"])
            has_guide = args.mask != "random" and args.guide_start != "auto" and not mask_column(args.guide_from)
            if not has_guide or str(seed) in known.get(arm, {}):
                continue
            train.fill_defaults(args)
            random = out / f"random-seed{seed}"
            config = random / "config.json"  # which a run begun a moment ago has not yet
            images = json.loads(config.read_text())["data"]["images"] if config.exists() else 0
            checkpoint = random / f"checkpoint-{args.guide_start * (images // args.batch_size):08d}"
            if not checkpoint.exists():
                print(f"{arm} {seed}: left out, there is no {checkpoint}", flush=True)
            else:
                known.setdefault(arm, {})[str(seed)] = rank_auc(options_of_run, checkpoint, pictures)
                print(arm, seed, round(known[arm][str(seed)], 1), flush=True)
    file.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
