"""The commands of analyze.py on any encoder, and the page that lets a person point at a patch."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from foreign import timm_vit
from helpers import QUICK, train_here

import analyze
import data
import masks
import report
import smae


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """An SMAE, a ViT without CLS token, and one with registers: of 4 x 4, 6 x 6 and 6 x 6 patches."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    sizes = dict(width=32, depth=4, heads=2, decoder_width=16, decoder_depth=2, decoder_heads=2)
    smae.save(smae.SMAE(**sizes, image_size=32, patch_size=8), root / "mae")
    for name, options in {"gap": dict(class_token=False, global_pool="avg"), "registers": dict(reg_tokens=4)}.items():
        torch.save(timm_vit(**options).state_dict(), root / f"{name}.pth")
        smae.save(smae.load(root / f"{name}.pth", heads=4), root / name)
    return root


def see(command: str, out, *checkpoints, **options) -> dict:
    """Run a command of analyze.py: result.json."""
    arguments = [
        command,
        "--checkpoint",
        *map(str, checkpoints),
        "--out",
        str(out),
        "--max-images",
        "6",
        "--drawn",
        "2",
    ]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    analyze.main(arguments)
    return json.loads((out / "result.json").read_text())


def test_every_command_takes_every_encoder_and_says_what_is_left_out(checkpoints, tmp_path):
    everyone = ["random", "pixels", f"ours={checkpoints / 'mae'}", checkpoints / "gap", checkpoints / "registers"]
    result = see("report", tmp_path, *everyone)
    assert set(analyze.FIGURES) < set(result) and result["pictures"] == 6
    names = ["random", "pixels", "ours", "gap", "registers"]
    assert list(result["variance"]["encoder: σ of features"]) == names
    assert list(result["variance"]["decoder: σ of features"]) == ["random", "ours"]  # random is like ours
    assert "gap has no CLS token, so no attention of it" in result["relations"]["left_out"]
    assert "pixels has no blocks" in result["attention"]["left_out"]
    assert list(result["attention"]["ours"]["distance"]) == ["1", "2", "3", "4", "decoder-1", "decoder-2"]
    assert "registers has no decoder" in result["tokens"]["left_out"]
    assert set(result["reconstruction"]["ours"]) == {"random", "own", "own, no hints"}
    assert {"loss", "object", "background"} == set(result["reconstruction"]["ours"]["random"])
    assert 0 <= result["layers"]["registers"]["2"]["auc"]["mean"] <= 1
    for name in (
        "attention",
        "fourier",
        "fourier-spectra",
        "tokens",
        "variance",
        "relations",
        "clusters",
        "layers-ours",
    ):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000, name
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in page and str(checkpoints) not in page
    assert not re.search(r"""(src|href)=["']?https?:""", page) and page.count("data:image/png") >= 10
    assert all(f"<h2 id={name}>" in page for name in analyze.FIGURES)


def test_all_sizes_but_the_models_own_and_layers_that_few_have(checkpoints, tmp_path):
    smae.save(smae.SMAE(width=32, depth=1, heads=2, decoder_depth=0, image_size=32, patch_size=16), tmp_path / "one")
    both = [f"mae={checkpoints / 'mae'}", f"one={tmp_path / 'one'}"]
    result = see("report", tmp_path / "a", *both, image_size=[32, 64], layers=[3])
    assert all("everything" not in what for name in analyze.FIGURES for what in result[name]["left_out"])
    assert "one has none of these layers" in result["layers"]["left_out"]
    assert '"name": "one"' not in (tmp_path / "a" / "report.html").read_text()  # the page shows what has the layer
    assert len(result["reconstruction"]["mae"]["random"]) == 3
    result = see("clusters", tmp_path / "b", f"one={tmp_path / 'one'}")  # four patches, eight clusters
    assert "one" not in result["clusters"]


@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError])
def test_a_command_that_fails_does_not_take_the_report_with_it(kind, checkpoints, monkeypatch, tmp_path):
    def fails(*_):
        """It fails."""
        raise kind("not today")

    monkeypatch.setattr(analyze, "FIGURES", {"attention": fails, "fourier": analyze.FIGURES["fourier"]})
    result = see("report", tmp_path, f"mae={checkpoints / 'mae'}")
    assert result["attention"]["left_out"] == ["everything: not today"] and result["fourier"]["mae"]
    assert (tmp_path / "report.html").exists()


def test_a_report_of_the_floor_without_blocks_is_a_report_whatever_the_locale(tmp_path, monkeypatch):
    # a text without an encoding is ASCII
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    result = see("report", tmp_path, "pixels")
    assert "pixels has no blocks" in result["layers"]["left_out"] and list(result["clusters"]) == ["pixels", "left_out"]


def test_a_command_alone_leaves_its_own_figures(checkpoints, tmp_path):
    result = see("attention", tmp_path, f"a={checkpoints / 'mae'}", f"b={checkpoints / 'mae'}")
    assert set(result) == {"arguments", "pictures", "attention"}
    assert result["attention"]["a"] == result["attention"]["b"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["attention.png", "result.json"]


def test_progress_is_that_of_a_run(quick_drawing, monkeypatch, tmp_path):
    train_here(monkeypatch, *QUICK, "--epochs", 3, "--save-every", 1, "--keep", 9, "--out", tmp_path / "run")
    result = see("progress", tmp_path / "seen", tmp_path / "run", "random")
    assert result["progress"]["run"]["epochs"] == [1, 2, 3]
    assert result["progress"]["left_out"][0].startswith("random: random has 0 checkpoints of a run")
    assert (tmp_path / "seen" / "progress-run.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["random", "random"], "two checkpoints are called random: name them apart"),
        (["a b=random", "a-b=random"], "a b and a-b would share their files: name them apart"),
        (["a=/nowhere/at/all"], "there is no checkpoint /nowhere/at/all"),
        (["$x_{^$=random"], "is no name for a checkpoint"),
        (["random", "--layers", "99"], "--layers 99: no encoder has such a block"),
        (["random", "--drawn", "0"], "'0' is not a number above 0"),
        (["random", "--mask-column", "nothing"], "shapes has no column 'nothing' of masks"),
    ],
)
def test_wrong_calls_give_one_line_and_leave_results_alone(arguments, message, tmp_path, capsys):
    (tmp_path / "result.json").write_text("earlier")
    with pytest.raises(SystemExit):
        analyze.main(["attention", "--checkpoint", *arguments, "--out", str(tmp_path), "--overwrite"])
    assert message in capsys.readouterr().err and (tmp_path / "result.json").read_text() == "earlier"
    with pytest.raises(SystemExit):
        analyze.main(["attention", "--checkpoint", "random", "--out", str(tmp_path)])
    assert "holds another run" in capsys.readouterr().err


def test_masks_of_several_checkpoints_lie_in_folders_of_their_own(checkpoints, tmp_path):
    both = [f"{name}={checkpoints / 'mae'}" for name in "ab"]
    analyze.main(["masks", "--checkpoint", *both, "--max-images", "6", "--out", str(tmp_path)])
    rows = [json.loads((tmp_path / name / "result.json").read_text())["rows"] for name in "ab"]
    assert rows[0] == rows[1] and len(rows[0]) > 12


def test_clusters_are_renumbered_to_agree():
    reference = torch.tensor([[0, 0, 1], [2, 2, 1]])
    labels = torch.tensor([[2, 2, 0], [1, 1, 0]])
    assert torch.equal(analyze.matched(labels, reference, 3), reference)


# ------------------------------------------------------------------------------------------- pointing at a patch

PROBE = """<script>
const seen = [], canvas = document.querySelectorAll("canvas")[1];
function point(x, y) {
  const box = canvas.getBoundingClientRect();
  const place = {clientX: box.left + x * box.width, clientY: box.top + y * box.height};
  canvas.dispatchEvent(new PointerEvent("pointermove", place));
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < pixels.length; i += 97) sum = (sum * 31 + pixels[i]) % 1000003;
  seen.push({caption: canvas.getAttribute("aria-label"), mean: +canvas.dataset.mean, sum});
}
point(0.1, 0.1);
point(0.9, 0.9);
canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));
point(0.63, 0.9);
document.dispatchEvent(new KeyboardEvent("keydown", {key: "]", bubbles: true}));
point(0.63, 0.9);
const what = document.getElementById("what");
what.value = "clusters";
what.dispatchEvent(new Event("change"));
point(0.63, 0.9);
document.dispatchEvent(new KeyboardEvent("keydown", {key: "m", bubbles: true}));
point(0.63, 0.9);
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>"""


def test_a_person_can_point_at_a_patch(checkpoints, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium")
    see("report", tmp_path, f"ours={checkpoints / 'mae'}")
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "probed.html").write_text(page.replace("</html>", PROBE + "</html>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'probed.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1])
    captions = [each["caption"] for each in seen]
    assert "layer 1, patch 1," in captions[0] and "patch 16," in captions[1]
    assert "patch 15," in captions[2]  # where the arrow key also led
    assert "layer 2, patch 15," in captions[3] and "cluster" in captions[4]
    assert len({each["sum"] for each in seen[:2] + seen[3:]}) == 5  # every step changes the picture

    # the numbers shown are those of the similarities
    model = smae.load(checkpoints / "mae")
    dataset = data.load_images("shapes", "test")
    images, _ = analyze.sample_pictures(dataset, 6, 32)
    tokens = model.features(data.normalize(images), 1)
    similarity = masks.similarity(tokens)[0].detach()
    for each, patch in ((seen[0], 0), (seen[1], 15)):
        assert each["mean"] / 255 * 2 - 1 == pytest.approx(similarity[patch].mean().item(), abs=0.005)


def test_the_explorer_holds_the_measures_in_bytes_and_averages_large_grids(checkpoints):
    model = smae.load(checkpoints / "mae")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    subject = analyze.Subject("a", analyze.encoders.ViT(model), images)
    large = analyze.Subject("b", subject.encoder, torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8))
    found = report.explore([subject, large], torch.arange(2), [2], "border", "contrast", 0.75, 3)
    small, averaged = found["encoders"]
    similarity = masks.similarity(model.features(data.normalize(images), 2))[1]
    stored = np.frombuffer(base64.b64decode(small["layers"][0]["similarity"][1]), np.uint8).reshape(16, 16)
    assert np.abs(stored / 255 * 2 - 1 - similarity.detach().numpy()).max() < 0.005
    mask = np.frombuffer(base64.b64decode(small["layers"][0]["mask"][0]), np.uint8)
    assert (mask == 255).sum() == 12 and (mask == 0).sum() == 4
    assert (averaged["rows"], averaged["columns"]) == (16, 16) and "20 x 20 patches, averaged" in averaged["name"]
    assert len(base64.b64decode(averaged["layers"][0]["similarity"][0])) == 256**2
