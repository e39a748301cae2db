"""Stage 2: train a student from a cache under DeepSpeed.

In: a `DistillConfig` (cache, student, recipe). Out: a run folder with metrics, checkpoints, an exported student and a
summary. `run.py` runs the whole job, `trainer.py` contains the training loop, and `targets.py` provides the targets.
`run_*.py` and `model_card.py` read and write files in the run folder. Checkpoints and TensorBoard events are written by
custom code: DeepSpeed's checkpoints are per-process pickles that cannot be loaded at a different world size, and
torch's `SummaryWriter` reports a full disk only in a background thread.
"""
