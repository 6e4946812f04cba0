"""The script and the notebook of docs/clusters.md, as they stand there."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from helpers import QUICK, ROOT, records

import checkpoint

PAGE = (ROOT / "docs" / "clusters.md").read_text()
STAND_INS = """
srun() {  # starts the tasks of one node, waits, ends with the largest exit code of any
    shift  # --kill-on-bad-exit
    largest=0; pids=""
    for task in $(seq 0 $((SLURM_NTASKS - 1))); do
        SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
        pids="$pids $!"
    done
    echo $pids > "$PIDS.part"; mv "$PIDS.part" "$PIDS"
    for pid in $pids; do wait $pid; code=$?; [ $code -gt $largest ] && largest=$code; done
    return $largest
}
scontrol() { echo "scontrol $*"; }
"""


def test_the_slurm_script_is_queued_again_after_its_signal_and_continues(tmp_path):
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)
    assert "--signal=USR1@" in script and "--requeue" in script
    long = [*QUICK, "--max-images", 640, "--save-every-steps", 2]  # forty steps in each of two epochs
    environment = os.environ | dict(
        ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", SLURM_NTASKS="2", SLURM_JOB_ID="77", SLURM_JOB_NODELIST="here",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000), OUT=str(tmp_path / "run"),
        PIDS=str(tmp_path / "pids"), SLURM_PROCID="", LOCAL_WORLD_SIZE="2",
    )  # fmt: skip
    command = ["bash", "-c", STAND_INS + script, "train.sh", *map(str, long)]
    how = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    job = subprocess.Popen(command, **how)
    deadline = time.monotonic() + 100
    while len(checkpoint.folders(tmp_path / "run")) < 2:
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 138 and "scontrol requeue 77" in printed, printed
    done = len(records(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0
    assert done < 2
    environment |= dict(SLURM_NTASKS="1", LOCAL_WORLD_SIZE="1")  # it may continue on fewer processes
    again = subprocess.run(command, timeout=200, **how)
    assert again.returncode == 0 and "continuing from" in again.stdout and "requeue" not in again.stdout
    assert len(records(tmp_path / "run")) == 2


def test_the_cells_of_the_notebook_run(quick_drawing, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    (cell,) = re.findall(r"## A notebook\n.*?```python\n(.*?)```", PAGE, re.DOTALL)
    small = '"--width", 32, "--depth", 2, "--heads", 2, "--precision", "no", "--workers", 0, "--epochs", 1'
    assert '"--epochs", 1' in cell
    quick = {'"--epochs", 1': small, '"knn",': '"knn", "--precision", "no", "--workers", 0,'}
    for old, new in quick.items():
        cell = cell.replace(old, new)
    variables = {}
    exec(cell, variables)
    assert str(variables["run"]) == "runs/notebook"
    assert json.loads((tmp_path / "runs/notebook-knn/result.json").read_text())["images"] == 1000
    with pytest.raises(ValueError, match="holds another run"):
        variables["train"].main(["--precision", "no", "--out", "runs/notebook"])
    with pytest.raises(ValueError, match="--precision bf16: this Python process has used another one"):
        variables["train"].main(["--precision", "bf16", "--out", "runs/other"])
