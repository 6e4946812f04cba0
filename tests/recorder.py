"""Notes for each process of train.py what it read, what it masked and what it ended with: in RANK.pt beside --out."""

import torch
import undrawn
from accelerate import PartialState

import train
from batches import TrainBatches
from guide import Guide


def apply():
    record = {"indices": [], "masked": []}
    read, choose, main, run = TrainBatches.epoch, Guide.mask_batch, train.main, train.Run

    def noted_epoch(self, epoch, seen=0):
        for batch in read(self, epoch, seen):
            record["indices"].append((epoch, batch.indices.tolist()))
            yield batch

    def noted_choice(*arguments):
        mask = choose(*arguments)
        record["masked"].append(mask.masked.tolist())
        return mask

    def noted_run(*arguments, **options):
        record["run"] = run(*arguments, **options)
        return record["run"]

    def noted_main():
        main()
        noted, state = record.pop("run"), PartialState()
        record.update(
            weights=noted.model.state_dict(), guide=noted.parts["guide"].state_dict(), world=state.num_processes
        )
        torch.save(record, noted.folder.path.parent / f"{state.process_index}.pt")

    TrainBatches.epoch, Guide.mask_batch, train.Run, train.main = noted_epoch, noted_choice, noted_run, noted_main
    undrawn.apply()
