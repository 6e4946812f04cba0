"""What the pages say exists: links, files, and commands with their options."""

import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

import analyze
import bench
import dense
import eval as judge
import reproduce
import train

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSE = {
    "train.py": train.parse_arguments,
    "eval.py": judge.build_parser().parse_args,
    "dense.py": dense.build_parser().parse_args,
    "analyze.py": analyze.build_parser().parse_args,
    "reproduce.py": reproduce.parse_arguments,
    "bench.py": bench.parse_arguments,
}
SHELL = r"""
note() { while [[ $# -gt 0 && $1 != [a-z]*.py ]]; do shift; done; printf '%s\x1f' "$@" >&3; printf '\n' >&3; }
python() { [[ $1 != -c ]] || echo 1; note "$@"; }
accelerate() { note "$@"; }; srun() { note "$@"; }; torchrun() { note "$@"; }
nice() { shift 2; "$@"; }; timeout() { shift; "$@"; }
command_not_found_handle() { true; }
PATH=
"""


def anchor(title: str) -> str:
    """What GitHub makes of a title."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def commands(page: Path, folder: Path) -> list[list[str]]:
    """The commands in its bash blocks: a shell without other programs runs them, and notes what they are given."""
    noted = folder / "noted"
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        script = f"exec 3>>{noted}\n{SHELL}\n{block}"
        subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, timeout=60)
    lines = noted.read_text().splitlines() if noted.exists() else []
    return [line.split("\x1f")[:-1] for line in lines if line.split("\x1f")[0] in PARSE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_title(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, title = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("http"):
            assert target.exists(), link
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if title else []
            assert not title or title in map(anchor, titles), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_parsed(page, tmp_path):
    for program, *options in commands(page, tmp_path):
        try:
            PARSE[program]([option for option in options if option != "…"])
        except SystemExit:
            pytest.fail(f"{program} {' '.join(options)}")


def test_the_shell_fills_in_what_a_page_sets(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '```bash\nA="--seed 3"\nfor i in 1 2; do\nnice -n 19 python train.py $A --epochs $i\ndone\nls\n```\n'
    )
    assert commands(page, tmp_path) == [["train.py", "--seed", "3", "--epochs", epochs] for epochs in "12"]


def test_the_map_of_files_is_complete():
    assert {f"`{file.name}`" for file in ROOT.glob("*.py")} <= set(re.findall(r"`\w+\.py`", PAGES[0].read_text()))
