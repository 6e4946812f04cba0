import functools
import json
import re
import sys

import forked
import pytest
import safetensors.torch
import torch
from foreign import mae_checkpoint, same_weights, timm_vit
from helpers import QUICK, ROOT, SMALL, contents, needs_compiler, records, run, train_here

import checkpoint
import cli
import eval as judge
import masks
import readers
import smae
import train

# ------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_all_it_promises_and_says_what_to_do_next(tmp_path):
    out = tmp_path / "run"
    result = run(*QUICK, "--guide-start", 1, "--out", out)
    assert result.returncode == 0, result.stderr
    checkpoints = ["checkpoint-00000002", "checkpoint-00000004"]
    assert sorted(file.name for file in out.iterdir()) == sorted([*train.RUN_FILES, "README.md", *checkpoints])
    first, second = records(out)
    assert {"epoch", "phase", "loss", "lr", "images_per_second", "seconds"} <= set(first)
    assert (first["epoch"], first["phase"], second["epoch"], second["phase"]) == (1, "random", 2, "selfguided")
    assert 0 < second["loss"] < 3 and first["lr"] > second["lr"] > 0

    world = 2 if "2 process(es)" in result.stdout else 1  # accelerate 1.15 quietly starts one
    assert world == 2 or "accelerate launch starts one process only; for more: torchrun" in result.stdout
    effective = f"effective batch 16 = {world} processes x 1 micro-batches x {16 // world}; learning rate 6.25e-05"
    assert effective in result.stdout and first["lr"] == pytest.approx(6.25e-5)  # where the warm-up ends
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("wrote config.json") and "next:" in last and str(out) in last

    model = smae.load(out)
    assert model.config["width"] == 32 and model.config["image_size"] == [32, 32]
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 32)
    config = json.loads((out / "config.json").read_text())
    assert config["train"]["guide_layer"] == 1 and config["train"]["dataset"] == "shapes"


@pytest.mark.parametrize("patch_size, flash", [(8, False), (2, True)])  # 16 and 256 patches
def test_few_patches_on_a_cpu_go_without_the_flash_kernel(quick_drawing, monkeypatch, tmp_path, patch_size, flash):
    chosen = []
    monkeypatch.setattr(torch.backends.cuda, "enable_flash_sdp", chosen.append)
    train_here(monkeypatch, *QUICK, "--patch-size", patch_size, "--out", tmp_path / "run")
    assert chosen == [flash]


def drawn_by(monkeypatch, *arguments) -> list:
    """The axes of the masks.png that a run leaves."""
    sheets, draw = [], train.pictures.mask_sheet
    monkeypatch.setattr(train.pictures, "mask_sheet", lambda *a, **kw: sheets.append(draw(*a, **kw)) or sheets[-1])
    train_here(monkeypatch, *QUICK, "--guide-start", 0, "--save-every", 2, *arguments)
    return sheets[-1].axes


def test_masks_png_shows_the_way_to_a_mask_for_eight_pictures(monkeypatch, tmp_path):
    axes = drawn_by(monkeypatch, "--out", tmp_path / "run", "--hint-ratio", 0.2)
    titles = [axis.get_title() for axis in axes if axis.get_title()]
    wanted = ["input", "random mask", "bipartition", "relevance", "informed mask", "informed mask,\n3 hints", "recon"]
    assert len(axes) == 56 and all(title.startswith(start) for title, start in zip(titles, wanted, strict=True))
    assert all(axis.images for axis in axes)
    assert [len(axis.patches) for axis in axes[5::7]] == [3] * 8  # a frame around each hint
    assert all(not axis.patches for i, axis in enumerate(axes) if i % 7 != 5)
    assert [len(axis.collections) for axis in axes] == [1, 0, 0, 0, 0, 0, 0] * 8  # the outline of the object
    for row in range(8):  # a quarter of the 4 x 4 patches shows the picture, the rest hides it
        picture = axes[7 * row].images[0].get_array()
        for column in (1, 4, 5):
            same = (axes[7 * row + column].images[0].get_array() == picture).all(-1)
            assert same.reshape(4, 8, 4, 8).all((1, 3)).sum() == 4


def test_masks_png_tells_thrown_patches_from_masked_ones(monkeypatch, tmp_path):
    axes = drawn_by(monkeypatch, "--mask", "amt", "--amt-ratio", 0.5, "--throw-ratio", 0.25, "--out", tmp_path / "run")
    titles = [axis.get_title() for axis in axes if axis.get_title()]
    assert titles == ["input", "random mask", "attention", "AMT mask\n(thrown away: black)", "reconstruction"]
    for row in range(8):
        picture, covered, rebuilt = (axes[5 * row + i].images[0].get_array() for i in (0, 3, 4))
        blocks = covered.reshape(4, 8, 4, 8, 3)
        thrown = (blocks == 0.08).all((1, 3, 4))
        shown = (covered == picture).all(-1).reshape(4, 8, 4, 8).all((1, 3))
        assert thrown.sum() == 4 and shown.sum() == 4 and not (thrown & shown).any()
        assert ((rebuilt.reshape(4, 8, 4, 8, 3) == 0.08).all((1, 3, 4)) == thrown).all()


def test_the_same_seed_gives_the_same_run_whatever_the_workers(quick_drawing, monkeypatch, tmp_path):
    for name, extra in (("a", []), ("b", ["--workers", 2]), ("c", ["--seed", 1])):
        train_here(monkeypatch, *QUICK, "--guide-start", 1, "--out", tmp_path / name, *extra)
    a, b, c = (smae.load(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])


def test_training_learns_something(quick_drawing, monkeypatch, tmp_path):
    arguments = [*QUICK, "--epochs", 15, "--lr", 3e-3, "--guide-start", 15, "--out", tmp_path / "run"]
    train_here(monkeypatch, *arguments)
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "extra",
    [
        ["--preload", "host", "--clip-grad", "0.1", "--mask", "random"],
        ["--precision", "bf16", "--raw-pixels", "--hint", "similar", "--foreground", "peak"],
        ["--log-with", "tensorboard", "--save-every", "1", "--crop-scale", "0.5", "1"],
        ["--mask", "amt", "--streaming", "--hint-ratio", "0.9"],
        ["--mask", "random", "--streaming", "--guide", "cached"],
        ["--guide", "cached", "--preload", "--guide-debias", "--relevance", "contrast"],
        ["--guide-layer", "decoder-1", "--precision", "bf16"],
    ],
    ids=lambda extra: " ".join(extra),
)
def test_options_run(extra, request, monkeypatch, tmp_path):
    monkeypatch.setattr(readers.StreamCrops, "block", 8)
    arguments = [*QUICK, "--guide-start", 1, "--out", tmp_path / "run", *extra]
    if "--precision" in extra:  # the first Accelerator of a process settles it
        assert forked.finish(forked.start(tmp_path / "log", *arguments)) == [0]
    else:
        if "host" not in extra:  # draws a run with random masks
            request.getfixturevalue("quick_drawing")
        train_here(monkeypatch, *arguments)
    mask = extra[extra.index("--mask") + 1] if "--mask" in extra else "selfguided"
    assert records(tmp_path / "run")[1]["phase"] == mask
    if "tensorboard" in extra:
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.parametrize("code", ["traced", pytest.param("generated", marks=[pytest.mark.slow, needs_compiler])])
def test_a_compiled_run(code, tmp_path):
    patches = {"traced": "eagerly", "generated": "undrawn"}[code]
    arguments = [*QUICK, "--compile", "--guide-start", 1, "--out", tmp_path / "run"]
    assert forked.finish(forked.start(tmp_path / "log", *arguments, patches=patches), 300) == [0]
    assert [record["phase"] for record in records(tmp_path / "run")] == ["random", "selfguided"]
    if code == "traced":  # the model that is trained, and the features that guide it
        assert (tmp_path / "log-0").read_text().count("traced a graph") == 2


# ------------------------------------------------------------------------------------------- watching


def test_probing_changes_nothing_in_the_training_and_agrees_with_eval(quick_drawing, monkeypatch, tmp_path, capfd):
    arguments = [*QUICK, "--epochs", 3, "--guide-start", 1]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "plain")
    probe = ["--probe-every", 2, "--probe-images", 60, 40, "--workers", 2]
    train_here(monkeypatch, *arguments, *probe, "--out", tmp_path / "probed")
    assert same_weights(*(smae.load(tmp_path / name) for name in ("plain", "probed")))
    states = [checkpoint.read(checkpoint.folders(tmp_path / name)[-1]) for name in ("plain", "probed")]
    plain, probed = (state["processes"][0]["random"] for state in states)
    assert torch.equal(plain["torch"], probed["torch"]) and plain["python"] == probed["python"]
    plain, probed = records(tmp_path / "plain"), records(tmp_path / "probed")
    assert [r["loss"] for r in plain] == [r["loss"] for r in probed]
    assert ["knn" in record for record in probed] == [False, True, True]  # every second, and the last
    said = capfd.readouterr().out
    assert "--probe-every 2: kNN on 60 and 40 pictures of shapes" in said
    assert f"kNN {probed[-1]['knn']:.2f} %" in said

    limits = dict(training=60, tests=40)  # eval.py tests on all: give it the same pictures
    load = judge.load_labelled

    def load_few(*arguments, **options):
        training, tests, classes = load(*arguments[:6], limits["training"])
        return training, tests.select(judge.data.evenly_spaced(len(tests), limits["tests"])), classes

    monkeypatch.setattr(judge, "load_labelled", load_few)
    command = ["knn", "--checkpoint", tmp_path / "probed", "--out", tmp_path / "knn", "--precision", "no"]
    assert judge.main([*command, "--workers", 0])["top1"] == probed[-1]["knn"]


def test_a_resumed_run_is_probed_like_an_uninterrupted_one(quick_drawing, monkeypatch, tmp_path):
    arguments = [*QUICK, "--epochs", 3, "--probe-every", 1, "--probe-images", 60, 40, "--save-every", 1]
    train_here(monkeypatch, *arguments, "--keep", 3, "--out", tmp_path / "whole")
    resume = ["--resume", tmp_path / "whole" / "checkpoint-00000002"]
    train_here(monkeypatch, *arguments, *resume, "--out", tmp_path / "resumed")
    found = [[record["knn"] for record in records(tmp_path / name)] for name in ("whole", "resumed")]
    assert found[0] == found[1] and len(found[0]) == 3


def test_without_labels_the_probe_is_left_out_with_a_word(quick_drawing, monkeypatch, tmp_path, capfd):
    from helpers import picture

    (tmp_path / "photos").mkdir()
    for i in range(16):
        picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
    arguments = [*QUICK, "--dataset", tmp_path / "photos", "--probe-every", 1]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "run")
    assert "--probe-every is left out: " in capfd.readouterr().out
    assert "knn" not in records(tmp_path / "run")[-1]
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *arguments, "--probe-dataset", tmp_path / "photos", "--out", tmp_path / "other")
    assert "has no split validation, val or test" in capfd.readouterr().err


def test_the_loss_curve_shows_the_accuracy_where_there_is_one(monkeypatch, tmp_path):
    line = dict(phase="random", loss=1.0, exploitation_masked=[0.5], exploitation_visible=[0.5])
    lines = [dict(epoch=1, **line), dict(epoch=2, knn=40.0, **line)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    axes = train.pictures.loss_curve(tmp_path / "metrics.jsonl").axes
    assert len(axes) == 3 and axes[2].lines[0].get_xydata().tolist() == [[2, 40]]


def test_a_run_is_repeated_and_what_is_given_beside_it_overrides(quick_drawing, monkeypatch, tmp_path, capfd):
    zeros = ["--warmup-epochs", 0, "--weight-decay", 0, "--guide-start", 0]  # not the defaults
    train_here(monkeypatch, *QUICK, *zeros, "--mask-ratio", 0.5, "--out", tmp_path / "first")
    capfd.readouterr()
    for place in (tmp_path / "first", tmp_path / "first" / "config.json"):
        out = tmp_path / f"again-{place.name}"
        train_here(monkeypatch, "--config", place, "--out", out)
        assert same_weights(smae.load(out), smae.load(tmp_path / "first"))
        assert f"repeating {place}, with the same options" in capfd.readouterr().out
    train_here(
        monkeypatch, "--config", tmp_path / "first", "--batch-size", 8, "--epochs", 3, "--out", tmp_path / "other"
    )
    printed = capfd.readouterr().out
    assert "but with --epochs 3 (there 2), --batch-size 8 (there 16)" in printed
    assert "all masks are random" not in printed
    config = json.loads((tmp_path / "other" / "config.json").read_text())["train"]
    assert (config["epochs"], config["batch_size"], config["mask_ratio"]) == (3, 8, 0.5)
    assert config["warmup_epochs"] == config["weight_decay"] == config["guide_start"] == 0
    assert config["lr"] == config["blr"] * 8 / 256  # what follows from other options follows anew


def test_of_two_learning_rates_the_later_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(options=dict(lr=0.3, blr=0.1))))
    for given, expected in ((["--blr", "0.5"], 0.5), (["--lr", "0.7"], 0.7), (["--blr", "0.5", "--lr", "0.7"], 0.7)):
        args = train.parse_arguments(["--config", str(tmp_path), *given, "--batch-size", "256"])
        train.fill_defaults(args)
        assert args.lr == expected


def test_that_a_guide_starts_too_late_to_guide_is_said(quick_drawing, monkeypatch, tmp_path, capfd):
    train_here(monkeypatch, *QUICK, "--guide-start", 2, "--hint-end", 0, "--mask", "random", "--out", tmp_path / "a")
    assert "all masks are random" not in capfd.readouterr().out  # nor do hints that random masks lack need to fit
    train_here(monkeypatch, *QUICK, "--guide-start", 2, "--out", tmp_path / "b")
    assert "all masks are random: 2 epochs end before the guide starts" in capfd.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "holds no options"),
        (dict(options=dict(mask="gone")), "invalid choice: 'gone'"),
        (dict(options=dict(epochs=[1, 2])), "unrecognized arguments: 2"),
        (dict(options=dict(crop_scale=[0.2])), "error: argument --crop-scale"),
        (dict(options=dict(seed={})), "invalid int value"),
        (None, "there is no such run folder"),
    ],
)
def test_what_is_no_run_cannot_be_repeated(content, message, monkeypatch, tmp_path, capfd):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        train_here(monkeypatch, "--config", tmp_path, "--out", tmp_path / "run")
    assert message in capfd.readouterr().err


def test_options_that_no_longer_exist_are_named(quick_drawing, monkeypatch, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(dict(options=dict(vanished=3, epochs=1))))
    train_here(monkeypatch, "--config", tmp_path, *QUICK, "--out", tmp_path / "run")
    assert "left out vanished, which are no options of train.py" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        train_here(monkeypatch, "--config", tmp_path, "--preset", "paper", "--out", tmp_path / "other")
    assert "leave out --preset" in capfd.readouterr().err


def test_hidden_test_labels_and_broken_test_pictures_stop_no_training(quick_drawing, monkeypatch, tmp_path, capfd):
    import datasets
    from helpers import image_bytes, picture

    def write(name: str, split: str, blobs: list, labels: list):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
        table = dict(image=[dict(bytes=blob, path=None) for blob in blobs], label=labels)
        (tmp_path / name).mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / name / f"{split}-0.parquet")

    blobs = [image_bytes(picture(seed=i)) for i in range(32)]
    for name, tests, labels in (("hidden", blobs[:8], [-1] * 8), ("broken", [b"no picture"] * 8, [0, 1] * 4)):
        write(name, "train", blobs, [0, 1] * 16)
        write(name, "test", tests, labels)
        arguments = [*QUICK, "--dataset", tmp_path / name, "--probe-every", 1, "--out", tmp_path / f"{name}-run"]
        train_here(monkeypatch, *arguments)
        assert len(records(tmp_path / f"{name}-run")) == 2 and "knn" not in records(tmp_path / f"{name}-run")[0]
    said = capfd.readouterr().out
    assert "--probe-every is left out: no picture of split test" in said
    assert said.count("WARNING: no kNN accuracy: none of the pictures can be decoded") == 2
    assert said.count("left out a broken image") == 8  # named once


def test_a_model_that_goes_on_from_a_norm_after_the_mean_trains_its_norm(quick_drawing, monkeypatch, tmp_path):
    torch.save(timm_vit(class_token=False, global_pool="avg", img_size=32).state_dict(), tmp_path / "gap.pth")
    start = ["--init-from", tmp_path / "gap.pth", "--heads", 4, *QUICK[len(SMALL) :]]
    start += "--decoder-width 32 --decoder-depth 1 --decoder-heads 2".split()
    train_here(monkeypatch, *start, "--out", tmp_path / "run")
    before, after = (smae.load(path, heads=4) for path in (tmp_path / "gap.pth", tmp_path / "run"))
    assert before.config["norm_after_mean"] and not after.config["norm_after_mean"]
    assert not torch.equal(before.norm.weight, after.norm.weight)


# ------------------------------------------------------------------------------------------- optimisation


def test_clipping_limits_the_gradient(quick_drawing, monkeypatch, tmp_path):
    norms = []
    clip = train.Accelerator.clip_grad_norm_
    monkeypatch.setattr(train.Accelerator, "clip_grad_norm_", lambda *a, **k: norms.append(a[2]) or clip(*a, **k))
    train_here(monkeypatch, *QUICK, "--out", tmp_path / "a")
    assert norms == []
    train_here(monkeypatch, *QUICK, "--out", tmp_path / "b", "--clip-grad", 0.25)
    assert norms == [0.25] * 4


def test_the_examples_of_the_pages_run_as_they_stand(quick_drawing, monkeypatch, tmp_path):
    pages = [ROOT / "README.md", ROOT / "docs" / "judging.md"]
    blocks = [re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in pages]
    assert all(blocks)
    train_here(monkeypatch, *QUICK, "--out", tmp_path / "runs" / "pretrain")
    command = [*"eval.py finetune --max-images 40 --epochs 1 --warmup-epochs 0 --workers 0 --precision no".split()]
    command += ["--checkpoint", str(tmp_path / "runs" / "pretrain"), "--out", str(tmp_path / "runs" / "finetune")]
    monkeypatch.setattr(sys, "argv", command)
    judge.main()
    monkeypatch.chdir(tmp_path)
    for page, of_page in zip(pages, blocks):
        for block in of_page:
            exec(compile(block, page.name, "exec"), {})


# ------------------------------------------------------------------------------------------- parts


def test_paper_preset_is_the_papers_recipe_and_flags_win():
    args = train.parse_arguments(["--preset", "paper", "--batch-size", "1024"])
    assert (args.model, args.image_size, args.patch_size, args.epochs) == ("base", 224, 16, 400)
    assert (args.warmup_epochs, args.guide_start, args.blr, args.weight_decay) == (40, 50, 1.5e-4, 0.05)
    assert (args.relevance, args.guide_debias, args.guide) == ("foreground", False, None)
    assert args.batch_size == 1024 and args.mask_ratio == 0.75 and tuple(args.crop_scale) == (0.2, 1.0)
    train.fill_defaults(args)
    assert args.lr == pytest.approx(6e-4)


def test_many_compiled_runs_fit_in_one_process(monkeypatch):
    """torch.compile has a limit of graphs for all models of a process together."""
    graphs = []
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph)
    )
    sizes = dict(depth=1, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2, image_size=16, patch_size=8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (8, 16):
            model = smae.SMAE(width=width, **sizes)
            train.prepare_kernels(model, torch.device("cpu"), compile=True)
            model(torch.randn(1, 3, 16, 16), masks.random_mask(1, 4))
    assert len(graphs) == 2


def test_the_guide_starts_after_half_of_the_epochs_unless_told():
    args = train.parse_arguments(["--epochs", "80"])
    train.fill_defaults(args)
    assert args.guide_start == 40 and args.guide == "online"
    args = train.parse_arguments(["--epochs", "400", "--mask", "amt"])
    train.fill_defaults(args)
    assert (args.guide_start, args.guide_every, args.guide) == (200, 40, "cached")


def test_every_option_has_help_and_shows_no_empty_default():
    parser = train.build_parser()
    assert all(action.help for action in parser._actions)
    text = " ".join(parser.format_help().split())
    assert "default: None" not in text and "default: False" not in text
    assert "default: 0.75" in text and "random seed (default: 0)" in text


# ------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by one process, by two, and by one in two micro-batches; float32, all phases."""
    root = tmp_path_factory.mktemp("runs")
    for name, processes, extra in (("one", 1, []), ("two", 2, []), ("accumulated", 1, ["--accumulate", 2])):
        out = root / name
        arguments = [*QUICK, "--epochs", 4, "--guide-start", 2, "--lr", 1e-3, "--out", out / "run", *extra]
        out.mkdir()
        assert (
            forked.finish(forked.start(out / "log", *arguments, world=processes, patches="recorder")) == [0] * processes
        )
    return root


def test_two_processes_read_other_pictures_draw_other_masks_and_end_alike(runs):
    first, second = (torch.load(runs / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    for epoch in range(1, 5):
        parts = [{i for e, rows in side["indices"] if e == epoch for i in rows} for side in (first, second)]
        assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 32
    assert len(first["masked"]) == len(second["masked"]) == 8
    assert all(a != b for a, b in zip(first["masked"], second["masked"]))
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert (runs / "two" / "run" / "model.safetensors").exists()


def test_one_process_two_processes_and_accumulation_follow_the_same_loss(runs):
    """To float tolerance; a guided mask is a ranking, which may swap two patches for a difference in the last bit."""
    curves = [[r["loss"] for r in records(runs / name / "run")] for name in ("one", "two", "accumulated")]
    for other in curves[1:]:
        assert other[:2] == pytest.approx(curves[0][:2], rel=1e-5)
        assert other[2:] == pytest.approx(curves[0][2:], rel=2e-3)
    assert abs(curves[0][0] - curves[0][1]) > 1e-3  # one epoch is not taken for another
    phases = [r["phase"] for r in records(runs / "two" / "run")]
    assert phases == ["random", "random", "selfguided", "selfguided"]


def test_one_process_reads_and_masks_what_two_did_together(runs):
    one = torch.load(runs / "one" / "0.pt", weights_only=True)
    two = [torch.load(runs / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for step, (epoch, indices) in enumerate(one["indices"]):
        assert indices == two[0]["indices"][step][1] + two[1]["indices"][step][1]
        if epoch <= 2:  # random masks hang on the seed alone; guided ones on weights that differ in the last bits
            assert one["masked"][step] == two[0]["masked"][step] + two[1]["masked"][step]


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--dataset ./nowhere", "cannot find data set './nowhere'"),
        ("--split other", "Unknown split 'other'"),
        ("--image-column nothing", "no column 'nothing'"),
        ("--image-column bbox", "not images"),
        ("--image-size 30", "30x30 is not a positive multiple of the patch size 8"),
        ("--guide-layer 3", "--guide-layer 3: there are 1, 2, decoder-1"),
        ("--guide-layer decoder-2", "--guide-layer decoder-2: there are 1, 2, decoder-1"),
        ("--guide-every -1", "--guide-every must not be negative"),
        ("--guide-start soon", "'soon' is neither a number of epochs nor auto"),
        ("--guide-layer last", "'last' is neither a number"),
        ("--mask amt --amt-ratio 0.6 --throw-ratio 0.4", "leaves no visible patch"),
        ("--mask-ratio 0", "between 0 and 1"),
        ("--mask-ratio 1.2", "between 0 and 1"),
        ("--mask-ratio 0.01", "leaves no masked patch"),
        ("--mask-ratio 0.99", "leaves no visible patch"),
        ("--hint-ratio 0.5", "asks for 8 hints, but only 4"),
        ("--hint-portion 0.1", "hint portion 0.1 of 16 patches holds 1 patches, too few for 2 hints"),
        ("--hint-ratio 0.2 --hint-portion 0.19", "--hint-portion 0.19 must not be smaller than --hint-ratio 0.2"),
        ("--hint-end 0.1", "--hint-end 0.1: hint portion 0.05 of 16 patches holds 0 patches, too few for 2 hints"),
        ("--hint-end 1.5", "--hint-end must lie between 0 and 1"),
        ("--guide-from nowhere", "there is no checkpoint nowhere"),
        ("--guide-from column:nothing", "the data has no column 'nothing' of mask pictures, only image"),
        ("--guide-from column:bbox", "no column 'bbox' of mask pictures"),
        ("--guide-from column:mask --guide online", "takes --guide cached"),
        ("--guide-from column:mask --streaming", "drop --streaming"),
        ("--guide-from centre --mask amt", "guides --mask selfguided, not --mask amt"),
        ("--guide-from centre --guide-shuffle", "changes nothing"),
        ("--guide-from centre --guide-debias", "this --guide-from has none"),
        ("--guide-image-size 64", "--guide-image-size takes"),
        ("--guide-image-size 64 --guide-from pixels", "--guide-image-size takes"),
        ("--guide-shuffle --mask random", "not for --mask random"),
        ("--guide-shuffle", "add --guide cached"),
        ("--hint-ratio -1", "hint ratio"),
        ("--batch-size 64", "than the data has (32)"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--accumulate 3", "multiple of processes x accumulation"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--warmup-epochs 9", "--warmup-epochs"),
        ("--guide-start -1", "--guide-start"),
        ("--crop-scale 0.5 0.2", "--crop-scale"),
        ("--save-every 0", "--save-every"),
        ("--heads 5", "must divide the width"),
        ("--decoder-depth 0", "--decoder-depth must be at least 1"),
        ("--max-images 0", "must be positive"),
        ("--streaming --preload", "cannot be preloaded"),
        ("--log-with nothing", "nothing"),
        ("--log-with comet_ml", "not installed"),
        ("--lr -1", "--lr must not be negative"),
        ("--image-size 0", "--image-size must be at least 1"),
        ("--guide-from {out}", "holds the checkpoint itself"),
        ("--out {out}/metrics.jsonl/run", "metrics.jsonl is not a folder"),
        ("--channels 0", "--channels must be at least 1"),
        ("--clip-grad -1", "--clip-grad must be positive, got -1"),
        ("--clip-grad 0", "--clip-grad must be positive, got 0"),
        ("--mask amt --guide-debias", "--mask amt follows attention"),
        ("--fresh-decoder", "takes the encoder of --init-from"),
        ("--object-ids 1", "explain the masks of --guide-from column:NAME"),
        ("--object-void 0", "explain the masks of --guide-from column:NAME"),
        ("--probe-dataset shapes", "--probe-dataset is for --probe-every"),
        ("--model huge", "not a positive multiple of the patch size 14"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_earlier_results(arguments, message, monkeypatch, tmp_path, capfd):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious")
    with pytest.raises(SystemExit) as stopped:
        train_here(monkeypatch, *QUICK, "--out", out, "--overwrite", *arguments.format(out=out).split())
    errors = capfd.readouterr().err
    lines = [line for line in errors.splitlines() if "train.py: error:" in line]
    assert stopped.value.code not in (0, None)
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in errors
    assert (out / "metrics.jsonl").read_text() == "precious" and len(list(out.iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.os, "access", lambda path, how: False)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be written to"):
        train.main([*QUICK, "--out", tmp_path / "deep" / "run"])


def test_a_wrong_call_fails_without_a_traceback_of_ours(tmp_path):
    (process,) = forked.start(tmp_path / "log", "--dataset", tmp_path / "none", "--out", tmp_path)
    assert forked.finish([process]) == [1]
    printed = process.log.read_text()
    assert "Traceback" not in printed and "neither here nor on the Hugging Face hub" in printed
    assert len([line for line in printed.splitlines() if line.startswith("train.py: error:")]) == 1


def test_an_empty_split_is_refused(monkeypatch, tmp_path, capfd):
    import datasets

    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": []}, features).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *QUICK, "--out", tmp_path / "run", "--dataset", tmp_path / "none.parquet")
    assert "is empty" in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_another_run_is_not_overwritten_unless_told(quick_drawing, monkeypatch, tmp_path, capfd):
    out = tmp_path / "run"
    train_here(monkeypatch, *QUICK, "--out", out)
    before = contents(out)
    with pytest.raises(SystemExit):
        train_here(monkeypatch, *QUICK, "--out", out, "--seed", 1)
    assert "holds another run" in capfd.readouterr().err
    assert contents(out) == before
    train_here(monkeypatch, *QUICK, "--out", out, "--seed", 1, "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert len(records(out)) == 2


def test_too_many_broken_pictures_leave_the_run_before_as_it_was(quick_drawing, monkeypatch, tmp_path, photos, capfd):
    train_here(monkeypatch, *QUICK, "--out", tmp_path / "run")
    before = contents(tmp_path / "run")
    arguments = [*QUICK, "--max-images", 40, "--batch-size", 40, "--dataset", photos, "--overwrite"]
    for extra in ([], ["--preload"], ["--streaming"]):
        with pytest.raises(SystemExit):
            train_here(monkeypatch, *arguments, "--out", tmp_path / "run", *extra)
        assert "17.png" in capfd.readouterr().err
    assert contents(tmp_path / "run") == before


def test_max_images_of_a_stream_is_the_length_of_an_epoch(monkeypatch, tmp_path):
    class Read(Exception):
        pass

    def batches(dataset, *, length, **options):
        assert length == 32 and sum(1 for _ in dataset) == 4000  # uneven shards would lose pictures
        raise Read

    monkeypatch.setattr(train, "TrainBatches", batches)
    with pytest.raises(Read):
        train_here(monkeypatch, *QUICK, "--streaming", "--max-images", 32, "--out", tmp_path / "run")


def test_the_first_of_two_processes_draws(tmp_path):
    arguments = [*QUICK, "--epochs", 1, "--out", tmp_path / "run"]
    assert forked.finish(forked.start(tmp_path / "log", *arguments, world=2, patches=None)) == [0, 0]
    for name in ("masks.png", "loss.png"):
        assert (tmp_path / "run" / name).stat().st_size > 5_000


# ------------------------------------------------------------------------------------------- from another checkpoint


def start_from(path, *options) -> tuple[smae.SMAE, smae.SMAE]:
    args = train.parse_arguments(["--init-from", str(path), *map(str, options)])
    train.fill_defaults(args)
    return train.build_model(args), smae.load(path, heads=args.heads)


def test_training_starts_from_encoder_and_decoder_of_another(tmp_path):
    torch.save({"model": mae_checkpoint()}, tmp_path / "mae.pth")
    model, source = start_from(tmp_path / "mae.pth", "--image-size", 64, "--heads", 4)
    assert model.config == source.config | dict(image_size=[64, 64], position_size=source.config["image_size"])
    assert same_weights(model, source)
    fresh, _ = start_from(
        tmp_path / "mae.pth", "--image-size", 64, "--heads", 4, "--fresh-decoder", "--decoder-depth", 3
    )
    assert len(fresh.decoder_blocks) == 3 and torch.equal(fresh.cls_token, source.cls_token)
    assert not torch.equal(fresh.mask_token[:32], source.mask_token)


def test_training_starts_from_an_encoder_alone_with_interpolated_positions(tmp_path):
    safetensors.torch.save_file(timm_vit().state_dict(), tmp_path / "vit.safetensors")
    model, source = start_from(tmp_path / "vit.safetensors", "--image-size", 64, "--heads", 4)
    assert model.config["decoder_width"] == 512 and len(model.decoder_blocks) == 8
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().encode(images), source.encode(images))
    assert isinstance(model.positions, torch.nn.Parameter) and model.positions.shape == (65, 64)
    args = train.parse_arguments(["--init-from", str(tmp_path / "vit.safetensors"), "--heads", "4"])
    train.build_model(args)
    assert args.fresh_decoder  # its lead at the start is none that --guide-start auto waits for
    own_size, _ = start_from(tmp_path / "vit.safetensors", "--heads", 4)
    assert own_size.config["image_size"] == [48, 48] and torch.equal(own_size.positions, source.positions)
    with pytest.raises(ValueError, match=r"another shape: cls_token"):
        start_from(tmp_path / "vit.safetensors", "--heads", 4, "--width", 32)


def test_a_decoder_goes_on_with_its_own_target_and_a_new_one_with_normalised_pixels(tmp_path):
    torch.save({"model": mae_checkpoint(), "args": {"norm_pix_loss": False}}, tmp_path / "mae.pth")
    for options, normalized in (([], False), (["--fresh-decoder"], True), (["--fresh-decoder", "--raw-pixels"], False)):
        model, _ = start_from(tmp_path / "mae.pth", "--heads", 4, *options)
        assert model.normalize_pixels == normalized


def test_the_guide_of_a_pre_trained_encoder_may_start_at_once(small_model, quick_drawing, monkeypatch, tmp_path):
    smae.save(small_model, tmp_path / "vit", format="timm")
    quick = QUICK[len(SMALL) :]
    arguments = [*quick, "--init-from", tmp_path / "vit", "--image-size", 48, "--guide-start", 0, "--lr", 0]
    arguments += ["--decoder-depth", 1]
    train_here(monkeypatch, *arguments, "--out", tmp_path / "run")
    assert [record["phase"] for record in records(tmp_path / "run")] == ["selfguided"] * 2
    trained = smae.load(tmp_path / "run")
    assert torch.equal(trained.embed.weight, small_model.embed.weight)  # the learning rate was 0
    assert trained.config["image_size"] == [48, 48] and trained.config["decoder_width"] == 512
