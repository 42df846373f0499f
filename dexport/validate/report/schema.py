"""What a stored report, a baseline and a manifest's record of a validation hold: checked when they are read.

Only what a view, a comparison or a gate looks at is named here; anything else may be there. A figure is finite or null.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args

import msgspec
from msgspec import Meta

from dexport.errors import InputError
from dexport.validate.gates import OF_VALIDATION, verdict_of

Number = Annotated[float, Meta(ge=-1e100, le=1e100)]
Figure = Number | None
Size = Annotated[float, Meta(ge=0, le=1e100)]
"""Of an error, a distance, a limit of one."""
Error = Size | None
Share = Annotated[float, Meta(ge=0, le=1)]
Decibels = Annotated[float, Meta(ge=-4000, le=4000)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Date = Annotated[str, Meta(pattern=r"\A[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{8,15}(\+00:00|Z)\Z")]
Verdict = Literal["passed", "failed", "lossy", "inconclusive", "not run"]
GateVerdict = Literal["pass", "lossy", "FAIL", "inconclusive"]
ChangeVerdict = Literal["same", "better", "worse"]
Status = Literal["passed", "lossy", "failed"]
Level = Literal["op", "forward", "trajectory", "distribution"]
Judged = Literal[*OF_VALIDATION]  # type: ignore[valid-type]
Measured = Literal["relative_l2", "psnr_db", "ssim", "lpips", "delta", "kernel_delta", "onnx_bytes"]
"""The last word of a measured metric's name, of which a baseline knows how far it may move."""
DEEPEST = 32
LONGEST_MESSAGE = 300


class Value(TypedDict):
    value: Figure
    margin: NotRequired[Error]


class Loss(TypedDict):
    accepted: bool
    relative_l2: Error
    latents_snr_db: Decibels | None
    psnr_db: Decibels | None


class Network(TypedDict):
    recipe: str
    config: dict[str, Any]
    precision: str


class SampledDistribution(TypedDict):
    evaluator: str
    count: Count


class Settings(TypedDict):
    levels: list[Level]
    labels: list[Count] | None
    steps: NotRequired[Count | None]
    sampler: NotRequired[str | None]
    cfg_scale: NotRequired[Figure]
    seed: NotRequired[int | None]
    distribution: SampledDistribution | None
    reference: dict[str, Any]


class Verdicts(TypedDict):
    """Of a gate, as a manifest keeps it."""

    metric: Judged
    value: Figure
    limit: Figure
    verdict: GateVerdict
    low: Figure
    high: Figure


class Gate(Verdicts):
    level: Level
    meaning: str
    better: Literal["lower", "higher"]
    source: str
    where: str
    advice: str


class Weights(TypedDict):
    path: str


class Bundle(TypedDict):
    name: str
    path: str
    built_with: str
    weights: Annotated[dict[str, Weights], Meta(min_length=1)]
    random: bool
    sha256: dict[str, str]


class Change(TypedDict):
    metric: str
    before: Figure
    now: Figure
    limit: Figure
    verdict: ChangeVerdict
    text: str


class Compared(TypedDict):
    """A report's section on a baseline."""

    path: str
    date: Date
    tools: dict[str, tuple[str | None, str | None]]
    files: list[str]
    changes: list[Change]


class Errors(TypedDict):
    relative_l2: Error
    max_abs: Error
    cosine: Figure


class OpCheck(TypedDict):
    op: str
    version: int
    module: str
    nodes: Count
    dtype: str
    shapes: list[list[Count]]
    metrics: Errors
    gate: Size
    passed: bool


class Ops(TypedDict):
    checks: list[OpCheck]


class Check(TypedDict):
    kind: str
    runner: str
    batch: Count
    output: str
    metrics: Errors
    gate: Size
    passed: bool
    status: Status


class Parity(TypedDict):
    checks: list[Check]


class At(TypedDict):
    t: Number
    relative_l2: Error


class Pair(TypedDict):
    number: Count
    label: str
    psnr_db: Decibels | None
    ssim: Number
    lpips: Figure
    gain: Count
    pytorch: str
    bundle: str
    difference: str


class Histogram(TypedDict):
    title: str
    unit: str
    edges: list[Number]
    counts: Annotated[list[Count], Meta(min_length=1)]


class Tokens(TypedDict):
    decided: Count
    otherwise: list[Count]
    equal: Share
    gate_l2: Size


class Trajectory(TypedDict):
    reference: str
    runner: str
    run: str
    seed: int
    drift: str
    states: Annotated[list[At], Meta(min_length=1)]
    evaluations: list[At]
    psnr_db: list[Decibels | None]
    ssim: list[Number]
    lpips: list[Number]
    gate_snr_db: Decibels
    pairs: list[Pair]
    histograms: list[Histogram]
    tokens: NotRequired[Tokens | None]


class Delta(TypedDict):
    a: Number
    b: Number
    delta: Number
    low: Number
    high: Number


class Floor(TypedDict):
    frechet: Number
    count: Count
    against: Count


class Distances(TypedDict):
    evaluator: str
    weights_sha256: str
    distance: str
    kernel_distance: str
    real_count: Count | None
    count: Count
    run: str
    seed: int
    delta: Delta
    kernel_delta: Delta | None
    floor: Floor | None
    pairs: list[Pair]
    histograms: list[Histogram]
    warnings: list[str]


class Block(TypedDict):
    path: str
    own: Error
    propagated: Error
    expected: Error
    passed: NotRequired[bool]


class Precision(TypedDict):
    part: str
    block: str
    nodes: dict[str, Count]
    quantised_layers: Count


class Sizes(TypedDict):
    onnx: Count
    plan: Count | None
    checkpoint: Count | None


class Environment(TypedDict):
    python: str
    system: str
    packages: dict[str, str]


class Report(TypedDict):
    """The JSON of ``dexport validate``."""

    dexport: str
    date: Date
    verdict: Verdict
    passed: bool
    loss: Loss
    bundle: Bundle
    network: Annotated[dict[str, Network], Meta(min_length=1)]
    settings: Settings
    gates: list[Gate]
    baseline: Compared | None
    not_run: list[str]
    ops: Ops | None
    forward: dict[str, Parity] | None
    trajectory: Trajectory | None
    distribution: Distances | None
    blocks: list[Block] | None
    metrics: dict[str, Value]
    precision_map: list[Precision]
    sizes: dict[str, Sizes]
    environment: Environment


class Baseline(TypedDict):
    """The JSON of ``dexport baseline update``; its network is only compared."""

    dexport: str
    date: Date
    network: dict[str, Any]
    settings: Settings
    metrics: dict[str, Value]
    files: dict[str, str]
    tools: dict[str, str]


class Record(Baseline):
    """What a manifest keeps of a validation."""

    verdict: Verdict
    loss: Loss
    gates: list[Verdicts]


def read_json(path: Path, hint: str) -> Any:
    """The JSON of a small file of somebody else.

    Raises:
        InputError: it cannot be read, is not JSON, or is nested beyond reason.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", hint=hint) from error
    level, inner = 0, [document]
    while inner:
        if level > DEEPEST:
            raise InputError(f"{path} is nested more than {DEEPEST} deep", hint=hint)
        holders = [value for value in inner if isinstance(value, dict | list)]
        inner = [item for value in holders for item in (value.values() if isinstance(value, dict) else value)]
        level += 1
    return document


def check_document(document: Mapping[str, Any], schema: type, name: object, hint: str) -> None:
    """Hold a report, a baseline or a record to its schema.

    Args:
        schema: :class:`Report`, :class:`Baseline` or :class:`Record`.
        name: of the file, for messages.

    Raises:
        InputError: with the place in the file and what was expected there.
    """
    if missing := [field for field in schema.__annotations__ if field not in document]:
        raise InputError(f"{name} lacks {', '.join(missing)}", hint=hint)
    try:
        msgspec.convert(document, schema)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # half a surrogate pair is no text
        raise InputError(f"{name} is damaged: {str(error)[:LONGEST_MESSAGE]}", hint=hint) from error
    problems = [*_unknown_metrics(document), *(() if schema is Baseline else _contradictions(document))]
    for problem in problems[:1]:
        raise InputError(f"{name} is damaged: {problem}", hint=hint)


def _unknown_metrics(document: Mapping[str, Any]) -> Iterator[str]:
    for name in document["metrics"]:
        if name.rpartition("/")[2] not in get_args(Measured):
            yield f"there is no metric {name[:LONGEST_MESSAGE]!r} - at `$.metrics`"


def _contradictions(document: Mapping[str, Any]) -> Iterator[str]:
    """What of a report, or of a record of one, fits its schema and not the rest of the document."""
    changes = (document.get("baseline") or {"changes": ()})["changes"]
    verdict = verdict_of(*([row["verdict"] for row in rows] for rows in (document["gates"], changes)))
    if document["verdict"] != verdict:
        yield f"its gates say {verdict} and not {document['verdict']} - at `$.verdict`"
    if document.get("passed", verdict == "passed") != (verdict == "passed"):
        yield "it contradicts the verdict - at `$.passed`"
    for section in ("trajectory", "distribution"):
        yield from _lengths(document.get(section) or {}, f"$.{section}")


def _lengths(section: Mapping[str, Any], path: str) -> Iterator[str]:
    """Lists that belong together."""
    pictures = len(section.get("psnr_db", ()))
    for name, allowed in (("ssim", (pictures,)), ("lpips", (0, pictures))):
        if len(section.get(name, ())) not in allowed:
            yield f"expected a figure for each of {pictures} pictures - at `{path}.{name}`"
    for index, histogram in enumerate(section.get("histograms", ())):
        if len(histogram["edges"]) != len(histogram["counts"]) + 1:
            yield f"expected one edge more than counts - at `{path}.histograms[{index}].edges`"
