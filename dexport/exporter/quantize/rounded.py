"""Rounded weights on disk, between the calibration that made them and the file that they go into."""

from __future__ import annotations

import shlex
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dexport.drafts import clear_remains
from dexport.errors import InputError
from dexport.exporter.quantize.gptq import (
    Rounded,
    nearest_int4,
    nearest_ternary,
    output_error,
    round_int4,
    round_ternary,
)
from dexport.exporter.quantize.schemes import INT4, TERNARY
from dexport.files import replacing, write_whole, writing_to

KEY = "key.json"
"""Says which build the weights are of."""
ROUND = {INT4: (round_int4, nearest_int4), TERNARY: (round_ternary, nearest_ternary)}


@dataclass(frozen=True)
class RoundedWeights:
    """Rounded weights on disk, one file per layer and scheme."""

    folder: Path

    def load(self, path: str, scheme: str) -> Rounded:
        """The weight of a layer.

        Raises:
            InputError: the file is damaged.
        """
        arrays = load_arrays(self._file(path, scheme))
        return Rounded(torch.from_numpy(arrays["codes"]), torch.from_numpy(arrays["scales"]), int(arrays["block"]))

    def errors(self, path: str, scheme: str) -> dict[str, float]:
        """Relative L2 error of the layer's output on the calibration: as it is, and had every value been rounded to
        the nearest code."""
        arrays = load_arrays(self._file(path, scheme))
        return {"relative_l2": float(arrays["error"]), "nearest_relative_l2": float(arrays["nearest_error"])}

    def has(self, path: str, scheme: str) -> bool:
        return self._file(path, scheme).exists()

    def save(self, path: str, scheme: str, weight: Tensor, hessian: Tensor) -> None:
        """Round a weight (out, in) and keep it."""
        rounding, nearest = ROUND[scheme]
        rounded = rounding(weight, hessian)
        total = float(output_error(weight, torch.zeros_like(weight), hessian).sum())
        errors = [
            float(output_error(weight, one.weight(), hessian).sum() / total) ** 0.5 if total else 0.0
            for one in (rounded, nearest(weight, hessian.diagonal()))
        ]
        save_arrays(
            self._file(path, scheme),
            codes=rounded.codes.numpy(),
            scales=rounded.scales.numpy(),
            block=np.array(rounded.block),
            error=np.array(errors[0]),
            nearest_error=np.array(errors[1]),
        )

    def claim(self, key: str) -> None:
        """Make the folder of a build, empty unless it holds what an earlier run of the same one left.

        Raises:
            InputError: a folder of that name that is not ours.
        """
        record = self.folder / KEY
        if self.folder.exists() and not record.is_file():
            raise InputError(
                f"{self.folder} is in the way: rounded weights are to be kept there",
                hint="move it, or choose another -o",
            )
        with writing_to(self.folder.parent):
            if record.is_file() and record.read_text(encoding="utf-8") != key:
                shutil.rmtree(self.folder)
        clear_remains(self.folder)
        write_whole(record, key)

    def remove(self) -> None:
        """Remove the folder, if it is one of ours."""
        if (self.folder / KEY).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, path: str, scheme: str) -> Path:
        return self.folder / f"{path}.{scheme}.npz"


def save_arrays(file: Path, **arrays: Any) -> None:
    """Write arrays; a kill leaves the file as it was."""
    with replacing(file) as target:
        np.savez(target, **arrays)


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as loaded:
            return dict(loaded)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{file} holds no rounded weights: {error}", hint=f"remove it: rm -r {shlex.quote(str(file.parent))}"
        ) from error
