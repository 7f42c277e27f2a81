"""`lorazip transfer discriminator` on a tiny base: what it makes, and that no text of the task stays anywhere."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest
import tiny

import lorazip
from lorazip.cli import main
from lorazip.errors import TargetError
from lorazip.eval import session
from lorazip.transfer import discriminator, train_discriminator


def words(n: int) -> list[str]:
    draw = random.Random(5)
    return ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(n)]


def test_it_is_an_adapter_that_judges_and_holds_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    base = tiny.make_base(tmp_path / "base")
    real = words(45)
    (tmp_path / "inputs.txt").write_text("".join(f"{word}\n" for word in real))
    output = tmp_path / "out" / "judge"
    with pytest.raises(SystemExit) as done:
        main(
            [
                *("transfer", "discriminator", "--base", str(base), "--inputs", str(tmp_path / "inputs.txt")),
                *("--backend", "hf", "--epochs", "2", "-o", str(output), "--json"),
            ]
        )
    assert done.value.code == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((output / "discriminator.json").read_text())
    discriminator.read(output)
    # The first five are shown, not judged.
    assert record["real"] + record["synthetic"] + record["held_out"] == 2 * 40
    assert 0 <= record["accuracy"] <= 1
    (adapter,) = lorazip.open_adapters([str(output)], base="any").adapters
    assert {name.rpartition(".")[2] for name in adapter.modules} == {"q_proj", "v_proj"}
    # Beside the adapter nothing is left: no file of it holds an input, and the user's common cache has none.
    assert [path.name for path in output.parent.iterdir()] == ["judge"]
    left = b"".join(p.read_bytes() for place in (output, home) for p in place.rglob("*") if p.is_file())
    assert [word for word in [*real, str(tmp_path)] if word.encode() in left] == []
    assert not list(home.rglob("*.sqlite3"))
    engine = session.engine("hf", "float32", "cpu")
    with pytest.raises(TargetError, match="exists"):
        train_discriminator.train(str(base), tmp_path / "inputs.txt", output, engine=engine)
