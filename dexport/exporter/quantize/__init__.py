"""Weights in fewer bits: ternary storage; INT8 with calibration along a sampling trajectory and explicit Q/DQ; INT4 and
ternary rounding with GPTQ; a scheme per layer, from a map or from a budget.

``onnxruntime.quantization`` is not used: it holds the whole model and every activation in memory, knows no timesteps,
and breaks on the ``value_info`` of traced graphs. torch's ``HistogramObserver`` is not used: it re-bins in floating
point, so that its result depends on how a run was cut into batches. The GPTQ packages are not used: they quantise
language models of transformers, layer by layer through the model's own blocks, and most need CUDA.
"""
