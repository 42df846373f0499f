"""Weights in fewer bits: ternary storage; INT8 with calibration along a sampling trajectory and explicit Q/DQ.

``onnxruntime.quantization`` is not used: it holds the whole model and every activation in memory, knows no timesteps,
and breaks on the ``value_info`` of traced graphs. torch's ``HistogramObserver`` is not used: it re-bins in floating
point, so that its result depends on how a run was cut into batches.
"""
