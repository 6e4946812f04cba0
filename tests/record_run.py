"""Run train.py as it is, and note for each process what it read, what it masked and the weights it ended with.

accelerate launch ... tests/record_run.py RECORD_FOLDER [arguments of train.py]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import PartialState

import data
import train

record = {"indices": [], "masked": []}
folder = Path(sys.argv.pop(1))
read, choose, build, guide = data.TrainBatches.epoch, train.choose_mask, train.build_model, train.build_guide


def noted_epoch(self, epoch, seen=0):
    for batch in read(self, epoch, seen):
        record["indices"].append((epoch, batch.indices.tolist()))
        yield batch


def noted_choice(*arguments):
    mask = choose(*arguments)
    record["masked"].append(mask.masked.tolist())
    return mask


def noted_model(*arguments):
    record["model"] = build(*arguments)
    return record["model"]


def noted_guide(*arguments):
    record["guide"] = guide(*arguments)
    return record["guide"]


data.TrainBatches.epoch, train.choose_mask, train.build_model = noted_epoch, noted_choice, noted_model
train.build_guide = noted_guide
train.main()
state = PartialState()
record["weights"] = record.pop("model").state_dict()
record["guide"] = record["guide"].state_dict()
record["world"] = state.num_processes
folder.mkdir(exist_ok=True)
torch.save(record, folder / f"{state.process_index}.pt")
