"""Stage 2: train a student from a cache under DeepSpeed.

In: a `DistillConfig`: cache, student, recipe. Out: a run folder with metrics, checkpoints, an exported student and a
summary. `run.py` is the whole job, `trainer.py` the loop, `targets.py` where targets come from; `run_*.py` and
`model_card.py` read and write a run's folder.
Custom code: checkpoints in safetensors, because DeepSpeed's own are pickles with one file per process, which cannot be
loaded at another world size; TensorBoard events, because torch's `SummaryWriter` reports a full disk in a thread.
"""
