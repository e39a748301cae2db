"""Stage 2: train a student from a cache under DeepSpeed.

In: a `DistillConfig` (cache, student, recipe). Out: a run folder with metrics, checkpoints, an exported student and a
summary. `run.py` runs the whole job, `trainer.py` contains the training loop, and `targets.py` provides targets.
`run_*.py` and `model_card.py` read and write files in the run folder. Checkpoints and TensorBoard events are custom
code. Checkpoints use safetensors, because DeepSpeed's checkpoints are pickles with one file per process and cannot be
loaded at a different world size. TensorBoard events are written directly, because torch's `SummaryWriter` reports a
full disk only in a background thread.
"""
