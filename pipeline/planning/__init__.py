"""Predicts memory, step time and cost of a run that was not started."""

from pipeline.planning.extraction import extraction
from pipeline.planning.prediction import Prediction, predict
from pipeline.planning.search import cheapest, search, verdicts
from pipeline.planning.sizes import measure_workload, model_size, row_shape, run_flops, step_tokens, total_steps

__all__ = [
    "Prediction",
    "cheapest",
    "extraction",
    "measure_workload",
    "model_size",
    "predict",
    "row_shape",
    "run_flops",
    "search",
    "step_tokens",
    "total_steps",
    "verdicts",
]
