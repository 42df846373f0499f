"""Distances between sets of images or of features, in float64 and without a framework."""

from dexport.validate.distances.frechet import frechet_distance
from dexport.validate.distances.inception_score import inception_score
from dexport.validate.distances.kernels import kernel_distance, rbf_distance
from dexport.validate.distances.moments import Moments, RunningMoments
from dexport.validate.distances.neighbours import precision_recall
from dexport.validate.distances.paired import PairedDelta, frechet_to, kernel_to, paired_delta
from dexport.validate.distances.pixels import PIXELS, load_images, pooled_pixels

__all__ = [
    "PIXELS",
    "Moments",
    "PairedDelta",
    "RunningMoments",
    "frechet_distance",
    "frechet_to",
    "inception_score",
    "kernel_distance",
    "kernel_to",
    "load_images",
    "paired_delta",
    "pooled_pixels",
    "precision_recall",
    "rbf_distance",
]
