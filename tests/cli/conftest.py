"""Fixtures of the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commandline import Ended, Run
from handmade import MakeAdapter

from lorazip.cli import main


@pytest.fixture
def lorazip(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: `lorazip("info", bundle)`."""

    def run(*arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        out, err = capsys.readouterr()
        return Ended(end.value.code, out, err)

    return run


@pytest.fixture
def zoo(make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three adapters below the working directory; the path is relative."""
    monkeypatch.chdir(tmp_path)
    make_adapter("zoo/ant")
    make_adapter("zoo/bee", rank=2, dtype=torch.bfloat16)
    make_adapter("zoo/cat", use_rslora=True)
    return Path("zoo")


@pytest.fixture
def team(zoo: Path, lorazip: Run) -> Path:
    """A bundle of them."""
    assert lorazip("compress", zoo, "-o", "team").code == 0
    return Path("team")
