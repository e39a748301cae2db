"""Forecasts of bytes, time, memory and FLOPs before anything is made."""
