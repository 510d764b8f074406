"""Checkpoints: what every stage was right after its update on batch n, and how a run goes on from there.

A marker travels down behind batch n, so the parts saved under one n are one consistent cut through the pipeline.

    RUN/checkpoints/00000300/stage-0.safetensors   tensors: weights/3.weight, optimizer/3.weight/exp_avg, predictor/…
                             stage-0.json          dtypes, shapes, numbers, counters; size and crc32 of that file
                             …                     one such pair from each stage: save_part
                             manifest.json         all of that, and the settings; only then is it a checkpoint: complete

Every file is written under another name, synced and renamed, and the manifest comes last. So a run that is killed at
any moment leaves its older checkpoint whole, and an unfinished folder without a manifest, which `newest` passes over.
Names are those of the whole model, never "stage k's": a run may go on with another number of stages.

torch.save and torch.distributed.checkpoint unpickle what they read, which runs whatever code a file brings along; so
safetensors and JSON, and what is read is checked like anything else from outside; no file name is taken from a file.
The checksums find damage, not malice: who may write the folder may change the weights.
"""

from dnipipe.checkpoint.files import write_tensors
from dnipipe.checkpoint.format import StageState
from dnipipe.checkpoint.load import Checkpoint, at, export, newest, search, weights
from dnipipe.checkpoint.optimizers import load_optimizer_state, optimizer_state
from dnipipe.checkpoint.save import complete, save_part

__all__ = [
    "Checkpoint",
    "StageState",
    "at",
    "complete",
    "export",
    "load_optimizer_state",
    "newest",
    "optimizer_state",
    "save_part",
    "search",
    "weights",
    "write_tensors",
]
