"""Forecasts the cost of a cache and its students in bytes, GPU-hours and memory, before anything runs.

In: options for stage 1 and stage 2, and a GPU model. Out: a `Forecast`, and tables of FLOPs and parameters.
`forecast.py` combines measurements from a small unit with FLOPs; `costs.py` counts FLOPs and step memory on the meta
device with PyTorch's own counter; `gpus.py` lists GPUs with figures from their data sheets.
"""
