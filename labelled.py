"""Pictures with labels, to train on and to test on, of the same classes."""

import re

import datasets

import data


def load_labelled(
    name: str,
    split: str,
    test_split: str | None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    skip_unlabelled: bool = False,
) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """Training and test pictures with labels of the same classes, and the names of these.

    ``max_images`` limits the training pictures, taken from all over the data.
    ``skip_unlabelled`` leaves out pictures whose label is hidden (-1) or missing. Raises ValueError
    if there are no labels, or labels of the test that the training does not have.
    """
    if streaming and skip_unlabelled:
        raise ValueError("--skip-unlabelled looks at all labels beforehand: drop it, or --streaming")
    columns = image_column, label_column, streaming
    if max_images is not None and max_images < 1:
        raise ValueError(f"--max-images must be positive, got {max_images}")
    training = data.load_images(name, split, *columns, max_images if streaming else None)
    tests = data.load_test_images(name, test_split, *columns)
    if not test_split and data.are_same(training, tests):
        advice = "name a test split (eval.py --test-split)"
        raise ValueError(f"{name} would be tested on what it is trained on, split {split!r}: {advice}")
    for dataset, option in ((training, "--split"), (tests, "--test-split")):
        label = (dataset.features or {}).get("label")
        if label is None:
            advice = f"name a column with --label-column, or another split with {option}"
            raise ValueError(f"split {dataset.split!s} of {name} has no labels; {advice}")
        if not re.match("u?int|bool|string|large_string", getattr(label, "dtype", "")):
            raise ValueError(f"labels of {name} must be classes, numbered or named, not {label}")
    if streaming:
        names = [getattr(dataset.features["label"], "names", None) for dataset in (training, tests)]
        if names[0] is None or names[0] != names[1]:
            raise ValueError("the labels of a stream must be of a ClassLabel type: drop --streaming")
        return training, tests, names[0]

    if skip_unlabelled:
        training, tests = _labelled_only(training), _labelled_only(tests)
        for dataset in (training, tests):
            if not len(dataset):
                raise ValueError(f"no picture of split {dataset.split!s} of {name} has a label")
    classes = getattr(training.features["label"], "names", None)  # else those of all pictures
    classes = classes or sorted(set(_labels_by_name(training)) - {None, -1})
    if max_images is not None:
        training = training.select(data.evenly_spaced(len(training), max_images))
    label, test_label = _labels_by_name(training), _labels_by_name(tests)
    number = {name: i for i, name in enumerate(classes)}
    for dataset, labels in ((training, label), (tests, test_label)):
        hidden = sum(name in (None, -1) for name in labels)
        where = f"labels of split {dataset.split!s} of {name}"
        if hidden:
            raise ValueError(f"{hidden} of {len(labels)} {where} are hidden (-1 or none): add --skip-unlabelled")
        unknown = sorted(map(str, {name for name in labels if name not in number}))
        if unknown:
            raise ValueError(f"{where} are not of the training data: {unknown[:5]}")
    training = training.remove_columns("label").add_column("label", [number[name] for name in label])
    tests = tests.remove_columns("label").add_column("label", [number[name] for name in test_label])
    return training, tests, [str(name) for name in classes]


def _labelled_only(dataset: datasets.Dataset) -> datasets.Dataset:
    """The pictures that have a label."""
    kept = [index for index, label in enumerate(dataset["label"]) if label not in (None, -1)]
    if len(kept) < len(dataset):
        left_out = len(dataset) - len(kept)
        data.say_once(f"split {dataset.split!s}: left out {left_out} of {len(dataset)} pictures, which have no label")
    return dataset.select(kept)


def _labels_by_name(dataset: datasets.Dataset) -> list:
    names = getattr(dataset.features["label"], "names", None)
    return [names[i] if names and i is not None and i >= 0 else i for i in dataset["label"]]
