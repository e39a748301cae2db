"""Forecasts the bytes, GPU-hours and memory needed for a cache and its students.

In: options for stage 1 and stage 2, and a GPU model. Out: a `Forecast`, and tables of FLOPs and parameters.
`forecast.py` combines measurements on a small unit with FLOPs; `costs.py` counts FLOPs on the meta device with
PyTorch's own counter; `step.py` measures a training step or counts its memory; `gpus.py`
lists GPUs with figures from their data sheets.
"""
