"""``--checkpoint [ROLE=]FILE``: a known role before the first ``=`` decides."""

from __future__ import annotations

import pytest

from dexport.cli.roles import checkpoints_by_role, known_roles
from dexport.errors import UsageError


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), {}),
        (("w.pt",), {"denoiser": "w.pt"}),
        (("denoiser=w.pt",), {"denoiser": "w.pt"}),
        (("decoder=vae.pt", "w.pt"), {"decoder": "vae.pt", "denoiser": "w.pt"}),
        (("lr=1/w.pt",), {"denoiser": "lr=1/w.pt"}),
        (("runs/decoder=2/w.pt",), {"denoiser": "runs/decoder=2/w.pt"}),
        (("denoiser=lr=1/w.pt",), {"denoiser": "lr=1/w.pt"}),
        (("decoder=hf://owner/name/w.pt::ema",), {"decoder": "hf://owner/name/w.pt::ema"}),
    ],
)
def test_files_by_role(texts: tuple[str, ...], expected: dict[str, str]) -> None:
    assert checkpoints_by_role(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("a.pt", "denoiser=b.pt"), r"a\.pt and b\.pt are both for the denoiser"),
        (("decoder=a.pt", "decoder=b.pt"), r"both for the decoder"),
        (("decoder=",), r"'decoder=' names no file"),
    ],
)
def test_what_is_refused(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        checkpoints_by_role(texts)
    assert set(known_roles()) == {"denoiser", "decoder"}
    assert caught.value.hint
