"""Checkpoints and the Hugging Face hub: fetch one by its name, write the card to publish one with.

Imports nothing of this project. ``smae.load`` and ``smae.save`` import it if it is there.
"""

import json
import re
from pathlib import Path

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has
FILES = {".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".npz", ".onnx", ".tar", ".gz", ".zip"}
NAME = re.compile(r"(\w[\w.-]*)/([\w.-]+)(@[\w./-]+)?", re.ASCII)
MARK = "<!-- Written by smae, and anew with every save: remove this line before you edit. -->"


def is_name(name: str) -> bool:
    """Whether ``name`` may be a repository, user/model or user/model@revision.

    What would lie in runs/, or in another folder that exists here, is a path.
    """
    found = NAME.fullmatch(name)
    if not found or Path(name).suffix in FILES:
        return False
    return found[1] != "runs" and not Path(found[1]).is_dir()


def fetch(name: str) -> Path:
    """The folder in the hub's cache that holds a checkpoint, downloaded where missing.

    Fetches config.json, preprocessor_config.json if there is one, and one file of weights, all of
    the same commit. Raises FileNotFoundError, in one line, if they cannot be had.
    """
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    repository, _, revision = name.partition("@")
    try:
        folder = Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent
        for file in ("preprocessor_config.json", *WEIGHTS):
            try:
                hf_hub_download(repository, file, revision=folder.name)  # its name is that of the commit
            except errors.EntryNotFoundError as error:
                missing = error
                found = try_to_load_from_cache(repository, file, revision=folder.name)
                known = found is not None and not isinstance(found, str)  # known not to exist
                unreachable = isinstance(error, errors.LocalEntryNotFoundError)
                if unreachable and not known and file not in WEIGHTS:  # it may say how images are normalised
                    raise
            else:
                if file in WEIGHTS:
                    return folder
        raise missing
    except errors.GatedRepoError:
        reason = f"accept its terms at {constants.ENDPOINT}/{repository}, then log in with: hf auth login"
    except errors.RepositoryNotFoundError:
        reason = "no such repository, or a private one: then log in with: hf auth login"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except errors.LocalEntryNotFoundError as error:
        reason = f"its files are not in the cache, and cannot be fetched: {error.__cause__ or error}"
    except errors.EntryNotFoundError:
        reason = f"it lacks config.json, or {' and '.join(WEIGHTS)}"
    except Exception as error:  # of the connection, of many kinds, or of the disk
        reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())[:300]
    raise FileNotFoundError(f"there is no checkpoint {name}, neither here nor on the Hugging Face hub: {reason}")


# ------------------------------------------------------------------------------ model cards

LOADING = {  # by format
    "smae": """```python
import smae  # NAME is this repository, or its folder

model = smae.load("NAME")
smae.save(model, "for-timm", format="timm")  # then: timm.create_model("local-dir:for-timm", pretrained=True)
```""",
    "timm": """```python
import timm  # NAME is this repository; for a folder, "local-dir:" and its path

model = timm.create_model("hf-hub:NAME", pretrained=True)
```

`smae.load("NAME")` reads it as well.""",
    "transformers": """```python
from transformers import ViTMAEForPreTraining  # NAME is this repository, or its folder

model = ViTMAEForPreTraining.from_pretrained("NAME")
```

`smae.load("NAME")` reads it as well.""",
}
TO_TRANSFORMERS = """
With `format="transformers"`, `transformers.ViTMAEForPreTraining` loads it."""
RECIPE = (  # options worth a line
    "dataset split test_split init_from checkpoint pool mask mask_ratio hint hint_ratio hint_portion guide guide_from "
    "guide_start guide_layer relevance foreground epochs warmup_epochs batch_size lr weight_decay crop_scale "
    "layer_decay drop_path mixup cutmix smoothing seed precision"
).split()
TASKS = {  # models on an encoder: what they are, and the hub's name for it
    "classifier": ("An image classifier", "image-classification"),
    "segmenter": ("A segmenter", "image-segmentation"),
    "detector": ("An object detector", "object-detection"),
}
NO_METRICS = ("phase", "knn_seconds", "lr", "images_per_second", "seconds", "bad_images")


def card(folder: Path, config: dict, parameters: int, format: str = "smae") -> str | None:
    """The text of a model card with the hub's front matter: what it is, recipe, metrics, how to load it.

    ``config``: the content of a run's config.json, or no more than the model's arguments under
    "model" (and "classifier", "segmenter" or "detector"). The metrics are the last of metrics.jsonl
    in ``folder``. None if people have edited the card there.
    """
    file, log = folder / "README.md", folder / "metrics.jsonl"
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return None
    lines = log.read_text().splitlines() if log.is_file() else []
    metrics = json.loads(lines[-1]) if lines else {}
    model, (task, what, pipeline) = config["model"], _task(config)
    options = next((config[name] for name in ("train", "finetune", "segment", "detect") if name in config), {})
    height, width = model["image_size"]
    decoder = f", decoder {model['decoder_width']} x {model['decoder_depth']}" if model["decoder_depth"] else ""
    front = dict(
        library_name=format,
        pipeline_tag=pipeline,
        tags=["vision-transformer", "masked-autoencoder", "smae"],
    )
    if source := config.get("data", {}).get("hub"):
        front["datasets"] = [source]
    recipe = [f"- {key.replace('_', ' ')}: {_public(options[key])}" for key in RECIPE if options.get(key) is not None]
    metrics = {key: value for key, value in metrics.items() if key not in NO_METRICS and not isinstance(value, list)}
    numbers = [f"| {key} | {_short(value)} |" for key, value in metrics.items()]
    images = config.get("data", {}).get("images")
    sections = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        MARK,
        f"# {folder.resolve().name}",
        f"{what} a vision transformer of width {model['width']}, depth {model['depth']} and {model['heads']} "
        f"heads{decoder}; patches of {model['patch_size']} px, images of {height} x {width} px in {model['channels']} "
        f"channels, normalised by mean {_short(model['mean'])} and deviation {_short(model['std'])}; "
        f"{parameters / 1e6:.1f} M parameters. No licence is named here: add `license:` above.",
    ]
    if recipe:
        sections += ["## Training", "\n".join(recipe + ([f"- training images: {images}"] if images else []))]
    if numbers:
        sections += ["## Metrics", "\n".join(["| after the last epoch | |", "|---|---|", *numbers])]
    plain = format == "smae" and model["decoder_depth"] and not task
    loading = LOADING[format] + (TO_TRANSFORMERS if plain else "")
    if task in ("segmenter", "detector"):  # only its encoder has a place there
        loading = loading.replace("smae.save(model,", "smae.save(model.encoder,")
    sections += ["## Load it", loading]
    return "\n\n".join(sections) + "\n"


def _task(config: dict) -> tuple[str | None, str, str]:
    """The task of a model on an encoder, or None; what the model is; the hub's name for what it does."""
    for task, (what, pipeline) in TASKS.items():
        if task in config:
            return task, f"{what} of {len(config[task]['classes'])} classes on", pipeline
    decoder = config["model"]["decoder_depth"]
    what = "A masked autoencoder with" if decoder else "The encoder of a masked autoencoder,"
    return None, what, "image-feature-extraction"


def _public(value) -> str:
    """An option; of a path, only the last part: the rest concerns nobody."""
    return Path(value).name if isinstance(value, str) and Path(value).exists() else _short(value)


def _short(value) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
