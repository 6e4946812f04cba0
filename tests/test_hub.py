"""Checkpoints and data sets by name, from a small hub on the loopback address; model cards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import small_hub
from foreign import same_weights, timm_vit, vitmae
from helpers import picture

import data
import hub
import smae

ROOT = Path(hub.__file__).parent


@pytest.fixture
def run_folder(small_model, tmp_path) -> Path:
    smae.save(small_model, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def ask(tmp_path):
    """Run code in a process of its own, whose hub is another one; the last line of its output, or of its error."""

    def ask(code: str, address: str, **variables) -> str:
        env = dict(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"), HF_HUB_DISABLE_XET="1", OMP_NUM_THREADS="1")
        env |= dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="0", HF_HUB_ETAG_TIMEOUT="1") | variables
        env["HF_DATASETS_CACHE"] = env["HF_HOME"] + "/datasets"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, cwd=tmp_path)
        return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]

    return ask


LOAD = "import hub; found = hub.fetch({!r}); print(sorted(p.name for p in found.iterdir()), len(found.name))"


FETCH_ALL = """
import hub
errors = []
for name in {}:
    try:
        hub.fetch(name)
    except FileNotFoundError as error:
        errors.append(str(error))
print(" | ".join(errors))
"""


def test_a_checkpoint_is_fetched_by_its_name_once(ask, run_folder):
    (run_folder / "optimizer.pt").write_text("large")
    with small_hub.served({"user/run": run_folder}) as served:
        expected = "['config.json', 'model.safetensors'] 40"
        assert ask(LOAD.format("user/run"), served.address) == expected
        fetched = {name for name in served.requests if name.startswith("GET /user")}
        assert sorted(name.rpartition("/")[2] for name in fetched) == ["config.json", "model.safetensors"]
        assert f"GET /user/run/resolve/{small_hub.COMMIT}/model.safetensors" in fetched  # of the commit of config.json
        served.requests.clear()
        assert ask(LOAD.format("user/run"), served.address) == expected
        assert not [name for name in served.requests if name.startswith("GET /user")]  # only asks what is newest
        served.requests.clear()
        assert ask(LOAD.format("user/run"), served.address, HF_HUB_OFFLINE="1") == expected
        assert not [name for name in served.requests if "user/run" in name]
        assert ask(LOAD.format("user/run@" + small_hub.COMMIT), served.address, HF_HUB_OFFLINE="1") == expected
    load = "import smae, torch; m = smae.load('user/run'); print(sum(t.double().sum().item() for t in m.parameters()))"
    total = sum(t.double().sum().item() for t in smae.load(run_folder).parameters())
    assert float(ask(load, served.address, HF_HUB_OFFLINE="1")) == pytest.approx(total, abs=1e-9)


def test_what_cannot_be_had_is_explained_in_a_line(ask, run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    folders = {"user/run": run_folder, "user/gated": run_folder, "user/empty": tmp_path / "empty"}
    with small_hub.served(folders | {"user/bare": tmp_path / "bare"}) as served:
        served.gated.add("user/gated")
        reasons = {
            "user/gated": f"accept its terms at {served.address}/user/gated, then log in with: hf auth login",
            "user/missing": "no such repository, or a private one",
            "user/run@v2": "it has no revision v2",
            "user/empty": "it lacks config.json",
            "user/bare": "model.safetensors and pytorch_model.bin",
        }
        errors = ask(FETCH_ALL.format(list(reasons)), served.address).split(" | ")
        for (name, reason), said in zip(reasons.items(), errors, strict=True):
            assert f"there is no checkpoint {name}, neither here nor on the Hugging Face hub" in said and reason in said
        said = ask("import hub; hub.fetch('user/run')", served.address, HF_HUB_OFFLINE="1")
        assert "not in the cache, and cannot be fetched" in said


def test_an_interrupted_download_is_taken_up_or_explained(ask, run_folder):
    with small_hub.served({"user/run": run_folder}) as served:
        served.cut["model.safetensors"] = 99  # times
        at_once = "import time; time.sleep = lambda *_: None; "  # huggingface_hub waits before it tries again
        said = ask(at_once + "import hub; hub.fetch('user/run')", served.address)
        assert "there is no checkpoint user/run, neither here nor on the Hugging Face hub" in said
        assert served.cut["model.safetensors"] < 99
        served.cut["model.safetensors"] = 1
        assert ask(at_once + "import smae; print(smae.load('user/run').config['width'])", served.address) == "32"
        assert served.cut["model.safetensors"] == 0


def test_how_images_are_normalised_is_never_guessed_offline(ask, run_folder, tmp_path):
    """A cache that others filled may lack the file that says it."""
    (run_folder / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.5, 0.5, 0.5])))
    with small_hub.served({"user/run": run_folder}) as served:
        files = ("config.json", "model.safetensors")
        ask(f"import huggingface_hub as h; print([h.hf_hub_download('user/run', f) for f in {files}])", served.address)
        said = ask("import hub; hub.fetch('user/run')", served.address, HF_HUB_OFFLINE="1")
        assert "not in the cache" in said
        expected = "['config.json', 'model.safetensors', 'preprocessor_config.json'] 40"
        assert ask(LOAD.format("user/run"), served.address) == expected
        assert ask(LOAD.format("user/run"), served.address, HF_HUB_OFFLINE="1") == expected


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_checkpoints_of_others_are_fetched_with_what_describes_them(kind, ask, tmp_path):
    if kind == "timm":
        timm = pytest.importorskip("timm")
        timm.models.save_for_hf(
            timm_vit(), tmp_path / "theirs", model_args=dict(num_heads=4), safe_serialization="both"
        )
    else:
        vitmae().save_pretrained(tmp_path / "theirs", safe_serialization=True)
        (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=[0.5, 0.4, 0.3])))
    with small_hub.served({"their/vit": tmp_path / "theirs"}) as served:
        code = "import smae; m = smae.load('their/vit'); smae.save(m, 'ours'); print(m.config['mean'])"
        mean = ask(code, served.address)
        assert not any(name.endswith(".bin") for name in served.requests if name.startswith("GET"))
    assert mean == ("[0.5, 0.4, 0.3]" if kind == "transformers" else "[0.5, 0.5, 0.5]")
    assert same_weights(smae.load(tmp_path / "ours"), smae.load(tmp_path / "theirs"))


def test_data_sets_are_loaded_by_their_short_names(ask, tmp_path):
    for folder, image, label, test in (("cifar", "img", "label", "test"), ("imagenet", "image", "label", "validation")):
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog"])})
        for split, count in (("train", 6), (test, 4)):
            rows = {image: [picture(seed=i) for i in range(count)], label: [i % 2 for i in range(count)]}
            dataset = datasets.Dataset.from_dict(rows, features)
            dataset.to_parquet(tmp_path / folder / "data" / f"{split}-00000-of-00001.parquet")
    folders = {"datasets/uoft-cs/cifar10": tmp_path / "cifar", "datasets/ILSVRC/imagenet-1k": tmp_path / "imagenet"}
    code = """
import data
for name in ("cifar10", "imagenet-1k"):
    training, tests = data.load_images(name), data.load_test_images(name, None)
    streamed = next(iter(data.load_images(name, streaming=True)))
    print(name, len(training), len(tests), training.column_names, training.features["label"].names, end=" ")
    print(data.decode(streamed["image"]).size, data.decode(training[0]["image"]).size, end="; ")
"""
    shape = "['image', 'label'] ['cat', 'dog'] (40, 30) (40, 30); "
    with small_hub.served(folders) as served:
        assert ask(code, served.address) + " " == f"cifar10 6 4 {shape}imagenet-1k 6 4 {shape}"
        served.gated.add("datasets/ILSVRC/imagenet-1k")
        cache = str(tmp_path / "another cache")
        said = ask("import data; data.load_images('imagenet-1k')", served.address, HF_HOME=cache)
        assert "accept its terms at huggingface.co/datasets/ILSVRC/imagenet-1k" in said


@pytest.mark.parametrize(
    "name, expected",
    [
        ("facebook/vit-mae-base", True),
        ("timm/vit_base_patch16_224.mae", True),
        ("user/run@v1.0", True),
        ("user/run@refs/pr/1", True),
        ("here/model", False),  # a folder of that name exists
        ("runs/photos", False),
        ("user/model.pth", False),
        ("user/model.pth.tar", False),
        ("./user/model", False),
        ("model", False),
        ("a/b/c", False),
        ("../a", False),
        ("/a/b", False),
        ("~/a", False),
    ],
)
def test_what_may_be_a_name(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.is_name(name) == expected


def test_a_path_wins_over_a_name(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda name: pytest.fail("the hub was asked"))
    smae.save(small_model, "user/model")
    assert same_weights(smae.load("user/model"), small_model)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint user/other"):
        smae.load("user/other")


# ------------------------------------------------------------------------------------------- cards


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return {name: json.loads(value) for name, value in (line.split(": ", 1) for line in front.splitlines())}


def test_a_card_says_what_was_trained_how_and_how_to_load_it(small_model, tmp_path):
    options = dict(dataset=str(tmp_path), epochs=3, lr=0.001, mask="selfguided", init_from=None, dataset_secret="x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 2, "loss": 0.9}\n{"epoch": 3, "loss": 0.75, "lr": 1}\n')
    smae.save(small_model, tmp_path / "run", dict(train=options, data=dict(images=12)))
    card = (tmp_path / "run" / "README.md").read_text()
    front = front_matter(card)
    assert front["library_name"] == "smae" and "datasets" not in front and "license" not in front
    assert "| loss | 0.75 |" in card and "- epochs: 3" in card and "training images: 12" in card
    assert f"- dataset: {tmp_path.name}\n" in card and str(tmp_path) not in card and "secret" not in card
    code = card.split("```python\n")[1].split("```")[0].replace("NAME", str(tmp_path / "run"))
    exec(code.replace('"for-timm"', repr(str(tmp_path / "for-timm"))))  # loads, and writes for timm
    assert front_matter((tmp_path / "for-timm" / "README.md").read_text())["library_name"] == "timm"


@pytest.mark.parametrize(
    "name, expected",
    [("cifar10", "uoft-cs/cifar10"), ("user/photos:small", "user/photos"), ("shapes", None), (".", None)],
)
def test_a_card_names_a_data_set_of_the_hub(name, expected, small_model, tmp_path):
    card = hub.card(tmp_path, dict(model=small_model.config, data=dict(hub=data.hub_id(name))), 1)
    assert front_matter(card).get("datasets") == ([expected] if expected else None)


def test_a_card_that_people_have_edited_stays(small_model, tmp_path):
    smae.save(small_model, tmp_path)
    card = tmp_path / "README.md"
    assert hub.MARK in card.read_text()
    card.write_bytes(b"my own w\xf6rds\r\n")
    smae.save(small_model, tmp_path)
    assert card.read_bytes() == b"my own w\xf6rds\r\n"


@pytest.mark.parametrize("what", ["config", "metrics", "folder"])
def test_no_card_is_no_reason_to_lose_the_weights(what, small_model, tmp_path):
    if what == "metrics":
        (tmp_path / "metrics.jsonl").write_text("damaged")
    if what == "folder":
        (tmp_path / "README.md").mkdir()
    with pytest.warns(UserWarning, match="no model card"):
        smae.save(small_model, tmp_path, dict(data="imagenet") if what == "config" else None)
    assert same_weights(smae.load(tmp_path), small_model)


@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_every_folder_that_can_be_published_has_a_card(format, small_model, tmp_path):
    smae.save(small_model, tmp_path, format=format)
    card = (tmp_path / "README.md").read_text()
    assert front_matter(card)["library_name"] == format
    assert f"import {format}" in card or f"from {format}" in card
