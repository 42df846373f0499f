"""Compile the kernels to PTX and cubin for any GPU generation, without a GPU.

The PTX is what TensorRT embeds and what :mod:`dexport.plugins.launch` runs; ptxas, which the triton package
brings, turns it into a cubin here only to prove that it assembles and to report registers, shared memory and
spills.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dexport.errors import MachineError, UsageError
from dexport.files import write_whole
from dexport.optional import optional_import
from dexport.plugins.op import DTYPES, TRITON_TYPES, Dims, DType, Kernel, Op, Tensor, Tile
from dexport.plugins.registry import all_ops
from dexport.plugins.tiles import preferred

TARGETS = ("sm80", "sm89", "sm90", "sm100", "sm120")
PTX_VERSION = {"sm100": 87, "sm103": 88, "sm120": 87, "sm121": 88}
"""PTX ISA, times ten, from which a driver knows the target. Older is better: a driver refuses PTX newer than
itself."""
DEFAULT_PTX_VERSION = 80
SCRATCH_PARAMETERS = 2
"""Triton appends two pointers, for global and profiling scratch memory, to every kernel."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one GPU generation, type, shape and tile.

    Attributes:
        entry: name of the PTX entry.
        parameters: the entry's parameters in order, ``tensor`` or ``int32`` by name.
        threads: threads per block.
        shared_bytes: dynamic shared memory per block.
        registers: per thread.
        spill_bytes: stores to and loads from local memory per thread, 0 when the kernel fits its registers.
        ptx, ptx_sha256, cubin: the artefact.
    """

    kernel: Kernel
    target: str
    dtype: DType
    dims: Dims
    tile: Tile
    entry: str
    threads: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    ptx: str
    ptx_sha256: str
    cubin: bytes

    @property
    def parameters(self) -> tuple[tuple[str, str], ...]:
        return parameters(self.kernel)

    def grid(self, dims: Dims) -> tuple[Any, Any, Any]:
        """Blocks to launch; ``dims`` may differ from the compiled ones in ``B`` only, which may be
        symbolic."""
        return self.kernel.grid(dims, self.tile.blocks)

    def summary(self) -> dict[str, Any]:
        """What a report prints, as JSON types."""
        return {
            "kernel": self.kernel.name,
            "target": self.target,
            "dtype": self.dtype,
            "dims": dict(self.dims),
            "tile": {**self.tile.blocks, "warps": self.tile.warps, "stages": self.tile.stages},
            "registers": self.registers,
            "shared_bytes": self.shared_bytes,
            "spill_bytes": self.spill_bytes,
            "ptx_sha256": self.ptx_sha256,
        }


def parameters(kernel: Kernel) -> tuple[tuple[str, str], ...]:
    """(name, ``tensor`` or ``int32``) of every argument, in the order of the PTX entry."""
    return (
        *((tensor.name, "tensor") for tensor in kernel.inputs),
        *((scalar, "int32") for scalar in kernel.scalars),
        *((tensor.name, "tensor") for tensor in kernel.outputs),
    )


def compile_kernel(kernel: Kernel, dims: Dims, dtype: DType, target: str, tile: Tile | None = None) -> CompiledKernel:
    """Compile one kernel.

    Args:
        dims: sizes from :meth:`Op.dims`; ``B`` is not compiled in.
        dtype: type of the tensors that have no type of their own.
        target: such as ``sm90``; it need not be the GPU of this machine.
        tile: block sizes; the preferred ones of ``tiles.toml`` by default.

    Raises:
        UsageError: unknown target or type.
        MachineError: triton is missing, or ptxas refuses the PTX.
    """
    architecture = _architecture(target)
    if dtype not in DTYPES:
        raise UsageError(f"{dtype} is not one of {', '.join(DTYPES)}")
    tile = tile or preferred(kernel, target, dtype)
    triton = optional_import("triton")
    compiler = optional_import("triton.compiler")
    backend = optional_import("triton.backends.compiler")

    constants = {**kernel.constants(dims, dtype), **tile.blocks}
    function = kernel.function()
    names = list(function.arg_names)
    signature = {name: "constexpr" if name in constants else "i32" for name in names}
    signature.update({tensor.name: f"*{_triton_type(tensor, dtype)}" for tensor in kernel.tensors})
    aligned = {(names.index(tensor.name),): [["tt.divisibility", 16]] for tensor in kernel.tensors}
    source = compiler.ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "ptx_version": PTX_VERSION.get(target, DEFAULT_PTX_VERSION),
        "enable_fp_fusion": True,
    }
    built = triton.compile(source, target=backend.GPUTarget("cuda", architecture, 32), options=options)
    ptx = without_scratch_parameters(built.asm["ptx"], built.metadata.name)
    cubin, log = assemble(ptx, architecture)
    registers, spill_bytes = parse_ptxas_log(log)
    return CompiledKernel(
        kernel=kernel,
        target=target,
        dtype=dtype,
        dims=dict(dims),
        tile=tile,
        entry=built.metadata.name,
        # Warp-specialised kernels would need more; none of ours is.
        threads=tile.warps * 32,
        shared_bytes=built.metadata.shared,
        registers=registers,
        spill_bytes=spill_bytes,
        ptx=ptx,
        ptx_sha256=hashlib.sha256(ptx.encode()).hexdigest(),
        cubin=cubin,
    )


def compile_op(op: Op, dims: Dims, dtype: DType, target: str) -> tuple[CompiledKernel, ...]:
    """All kernels of an op that fit these sizes: its steps, its fused form and its plugin."""
    return tuple(compile_kernel(k, dims, dtype, target) for k in op.all_kernels() if k.fits(dims, dtype))


PUBLISHED_SIZES: Mapping[str, tuple[tuple[Sequence[Sequence[int]], Mapping[str, int]], ...]] = {
    "DexTMSA": (  # DiffiT 256 and 512
        (((2, 256, 3456), (2, 3456), (16, 961)), {"num_heads": 16, "window": 16}),
        (((2, 1024, 3456), (2, 3456), (16, 3969)), {"num_heads": 16, "window": 32}),
    ),
    "DexLinearAttention": (  # LiT-XL/2 at 256 and 512
        (((2, 256, 1152),) * 3, {"num_heads": 4}),
        (((2, 1024, 1152),) * 3, {"num_heads": 4}),
    ),
    "DexChannelAttention": tuple(  # DiCo-XL's levels, and a size that the fused kernel takes
        (((2, c, side, side), (c, c, 1, 1), (c,)), {}) for c, side in ((416, 32), (832, 16), (1664, 8), (512, 8))
    ),
    "DexTernaryMatMul": (  # TerDiT-600M's attention at 256, TerDiT-4.2B's feed-forward at 512
        (((2, 256, 1536), (384, 1536), (1,)), {}),
        (((2, 1024, 3072), (2048, 3072), (1,)), {}),
    ),
}
"""Input shapes and attributes of the published models, which reports compile for."""


def compile_all(targets: Iterable[str] = TARGETS, dtypes: Iterable[DType] = ("float16",)) -> list[CompiledKernel]:
    """Every op at :data:`PUBLISHED_SIZES`, for every target and type."""
    targets, dtypes = tuple(targets), tuple(dtypes)
    return [
        compiled
        for op in all_ops()
        for shapes, attributes in PUBLISHED_SIZES.get(op.name, ())
        for target in targets
        for dtype in dtypes
        for compiled in compile_op(op, op.dims(shapes, attributes), dtype, target)
    ]


def write_kernels(compiled: Iterable[CompiledKernel], folder: Path) -> None:
    """Write ``<kernel>-<target>-<dtype>-<sizes>.ptx`` and ``.cubin`` files.

    Raises:
        MachineError: the folder cannot be written.
    """
    for kernel in compiled:
        sizes = "-".join(f"{name}{size}" for name, size in kernel.dims.items() if name != "B")
        stem = f"{kernel.kernel.name}-{kernel.target}-{kernel.dtype}-{sizes}"
        write_whole(folder / f"{stem}.ptx", kernel.ptx)
        write_whole(folder / f"{stem}.cubin", kernel.cubin)


def without_scratch_parameters(ptx: str, entry: str) -> str:
    """The PTX without the scratch pointers that Triton appends: nobody would pass them.

    TensorRT passes a plugin's inputs, scalars and outputs and nothing else.

    Raises:
        MachineError: the kernel uses scratch memory after all.
    """
    header = re.search(rf"\.entry\s+{re.escape(entry)}\((.*?)\n\)", ptx, re.DOTALL)
    if header is None:
        raise MachineError(f"Triton's PTX has no entry {entry}")
    kept = header.group(1).strip().split(",\n")
    for parameter in kept[-SCRATCH_PARAMETERS:]:
        name = parameter.split()[-1]
        if re.search(rf"\[{re.escape(name)}(\+\d+)?\]", ptx):
            raise MachineError(f"{entry} needs scratch memory, which a plugin cannot have")
    body = ",\n".join(kept[:-SCRATCH_PARAMETERS])
    return ptx[: header.start(1)] + "\n" + body + ptx[header.end(1) :]


def assemble(ptx: str, architecture: int) -> tuple[bytes, str]:
    """(cubin, ptxas's report) of PTX for an architecture such as 90; needs no GPU."""
    nvidia = optional_import("triton.backends.nvidia.compiler")
    ptxas = nvidia.get_ptxas(architecture).path
    suffix = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    name = suffix.group(1) if suffix else f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, encoding="utf-8")
        done = subprocess.run(
            [ptxas, "-v", f"--gpu-name={name}", str(source), "-o", str(cubin)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise MachineError(f"ptxas refuses the PTX for {name}: {done.stderr.strip()[-400:]}")
        return cubin.read_bytes(), done.stderr + done.stdout


def parse_ptxas_log(log: str) -> tuple[int, int]:
    """(registers per thread, bytes spilled: stores plus loads) from ``ptxas -v``."""
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise MachineError(f"ptxas reports no registers: {log.strip()[-200:]}")
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    return int(registers.group(1)), sum(spills)


def _architecture(target: str) -> int:
    match = re.fullmatch(r"sm(\d{2,3})", target)
    if match is None or int(match.group(1)) < 80:
        raise UsageError(f"{target} is not a target from sm80 on", hint=f"such as {', '.join(TARGETS)}")
    return int(match.group(1))


def _triton_type(tensor: Tensor, dtype: DType) -> str:
    return TRITON_TYPES[tensor.dtype or dtype]
