"""``--checkpoint [ROLE=]FILE``: a role before the first ``=`` decides, unless the whole is a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from dexport.cli.roles import checkpoints_by_role
from dexport.errors import UsageError


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), {}),
        (("w.pt",), {"": "w.pt"}),
        (("denoiser=w.pt",), {"denoiser": "w.pt"}),
        (("decoder=vae.pt", "w.pt"), {"decoder": "vae.pt", "": "w.pt"}),
        (("./lr=1/w.pt",), {"": "./lr=1/w.pt"}),
        (("expert.0=b.ckpt", "expert.1=c.ckpt"), {"expert.0": "b.ckpt", "expert.1": "c.ckpt"}),
        (("runs/decoder=2/w.pt",), {"": "runs/decoder=2/w.pt"}),
        (("denoiser=lr=1/w.pt",), {"denoiser": "lr=1/w.pt"}),
        (("decoder=hf://owner/name/w.pt::ema",), {"decoder": "hf://owner/name/w.pt::ema"}),
    ],
)
def test_files_by_role(texts: tuple[str, ...], expected: dict[str, str]) -> None:
    assert checkpoints_by_role(texts) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("a.pt", "b.pt"), r"a\.pt and b\.pt are both for the main network"),
        (("decoder=a.pt", "decoder=b.pt"), r"both for the decoder"),
        (("decoder=",), r"'decoder=' names no file"),
    ],
)
def test_what_is_refused(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        checkpoints_by_role(texts)
    assert caught.value.hint


def test_a_file_that_is_there_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.pt").write_text("weights")
    assert checkpoints_by_role(["lr=1.pt"]) == {"": "lr=1.pt"}
    assert checkpoints_by_role(["lr=2.pt"]) == {"lr": "2.pt"}
