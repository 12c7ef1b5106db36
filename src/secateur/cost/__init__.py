"""Cost in time: the latency of models, measured, and predicted from measured layers."""

from secateur.cost.latency import measure_latency, sample_latency
from secateur.cost.latency_table import LatencyTable

__all__ = ["LatencyTable", "measure_latency", "sample_latency"]
