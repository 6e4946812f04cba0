"""The shelves of the house: imports point down, and no command imports another."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHELVES = [  # from top to bottom; reproduce drives other commands
    {"reproduce"},
    {"train", "eval", "dense", "analyze", "bench"},
    {"run", "encoders", "pictures", "looks", "contest", "report", "tasks", "scores", "overlays"},
    {"cli", "guide", "checkpoint"},
    {"batches", "readers", "cropping", "data", "folders", "objects", "pixels", "shapes", "labelled"}
    | {"label_maps", "instances", "scenes"},
    {"smae", "convert", "masks", "measures", "probes", "optim", "hub", "segmenter", "detector"},
]
ALONE = {name: set() for name in ("hub", "masks", "convert", "measures", "optim", "segmenter", "detector")}
ALONE["smae"] = {"convert", "hub", "segmenter", "detector"}


def imports(file: Path) -> set[str]:
    """The files of this project that a file imports, at its top or within functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & {other.stem for other in ROOT.glob("*.py")}


def test_every_file_has_its_shelf():
    assert sorted(file.stem for file in ROOT.glob("*.py")) == sorted(set().union(*SHELVES))


def test_imports_point_down_and_no_command_imports_another():
    level = {name: number for number, shelf in enumerate(SHELVES) for name in shelf}
    for file in ROOT.glob("*.py"):
        for name in imports(file):
            lower = level[name] > level[file.stem]
            beside = level[name] == level[file.stem] and file.stem not in SHELVES[1]
            assert lower or beside, f"{file.stem} imports {name}"


def test_no_imports_go_round_in_circles():
    graph = {file.stem: imports(file) for file in ROOT.glob("*.py")}
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert free, f"imports go round in circles among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_what_works_alone_imports_nothing_of_ours():
    for name, allowed in ALONE.items():
        assert imports(ROOT / f"{name}.py") <= allowed, name


def test_tests_do_not_import_one_another():
    for file in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [module for module in modules if module.startswith("test_")], file.name


def test_every_file_can_be_imported_where_unix_is_not_nor_what_only_scores_need():
    """Windows has neither fcntl nor SIGUSR1; torchmetrics and faster-coco-eval are wanted by dense.py alone."""
    names = sorted(file.stem for file in ROOT.glob("*.py"))
    code = f"""
import importlib, signal, sys
sys.modules["fcntl"] = sys.modules["torchmetrics"] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGALRM"):
    delattr(signal, name)
for name in {names}:
    importlib.import_module(name)
import checkpoint, pathlib, scores
assert scores.faster_coco_eval is None
with checkpoint.Lock(pathlib.Path(".")) as lock, checkpoint.Signals() as signals:
    lock.take()
    assert signals.caught() == 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
