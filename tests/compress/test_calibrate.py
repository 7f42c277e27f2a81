"""--calibrate: the weights against gradients taken another way, and what they do to the choice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch

import lorazip
from lorazip.cli import main
from lorazip.compress import calibrate, job, join
from lorazip.errors import InputError, TargetError, UsageError

CPU = torch.device("cpu")
TEXTS = ("abcdefgh ijkl", "x = 1; y = x", "Hello, world! 12345")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    for adapter in tiny.make_adapters(root, [f"a{i}" for i in range(6)]):
        assert adapter.is_dir()
    return root


def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return str(path)


def test_weights_are_roots_of_fisher_traces(base: Path, tmp_path: Path) -> None:
    """||d log p / dW||^2 of every single token: the gradient of a copy of W that this token alone uses."""
    from transformers import AutoModelForCausalLM

    names = [tiny.Q0, "model.layers.1.mlp.down_proj"]
    shapes = {name: tiny.MODULES[name] for name in names}
    found = calibrate.weights(str(base), prompts(tmp_path), shapes, CPU)
    model = AutoModelForCausalLM.from_pretrained(base)
    random = torch.Generator().manual_seed(calibrate.SEED)
    sums = dict.fromkeys(names, 0.0)
    for text in TEXTS:
        ids = torch.tensor([tiny.encode(text)])
        drawn = torch.multinomial(model(ids).logits[0].softmax(-1), 1, generator=random)
        for name in names:
            layer = model.get_submodule(name)
            copies = layer.weight.detach().expand(ids.shape[1], -1, -1).clone().requires_grad_(True)
            plain = layer.forward
            layer.forward = lambda x, copies=copies: torch.einsum("bti,toi->bto", x, copies)
            total = model(ids).logits[0].log_softmax(-1).gather(1, drawn).sum()
            layer.forward = plain
            (gradient,) = torch.autograd.grad(total, copies)
            sums[name] += float(gradient[1:].square().sum())
    assert found[names[0]] / found[names[1]] == pytest.approx(
        math.sqrt(sums[names[0]] / sums[names[1]]), rel=1e-3
    )
    assert math.prod(found.values()) == pytest.approx(1)


def test_bytes_go_where_errors_cost_most(
    base: Path, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dear = tiny.Q0
    monkeypatch.setattr(
        calibrate,
        "weights",
        lambda base, prompts, shapes, *rest: {m: 1e3 if m == dear else 1.0 for m in shapes},
    )
    plain = job.run([zoo], lorazip.Spec(ratio=12), tmp_path / "plain")
    made = job.run([zoo], lorazip.Spec(ratio=12, calibrate=str(base)), tmp_path / "made")
    at = made.modules.index(dear)
    assert float(made.errors[:, at].nanmean()) < 0.5 * float(plain.errors[:, at].nanmean())
    assert float(made.adapter_errors.mean()) > float(
        plain.adapter_errors.mean()
    )  # what is reported is ||D^ - D||
    assert made.bundle_bytes <= made.original_bytes / 12
    assert made.bundle is not None
    name, _, digest = str(made.bundle.manifest.options["calibrate"]).partition("@")
    assert name == base.name and len(digest) == 12


def test_dry_run_predicts_plain_errors(base: Path, zoo: Path, tmp_path: Path) -> None:
    spec = lorazip.Spec(ratio=8, calibrate=str(base), prompts=prompts(tmp_path))
    dry = job.run([zoo], spec, None)
    made = job.run([zoo], spec, tmp_path / "made")
    assert dry.bundle_bytes == pytest.approx(made.bundle_bytes, rel=0.02)
    # Rows of 64 numbers are short for a prediction: those of real adapters are within 2 % (tests of auto).
    assert float(dry.adapter_errors.mean()) == pytest.approx(float(made.adapter_errors.mean()), rel=0.15)


def test_another_base_is_refused_by_module(tmp_path: Path, zoo: Path, base: Path) -> None:
    with pytest.raises(InputError, match=r"model.layers.7.self_attn.q_proj: is not there"):
        calibrate.weights(str(base), None, {"model.layers.7.self_attn.q_proj": (64, 64)}, CPU)
    with pytest.raises(InputError, match=r"is 64 x 64 there; the adapters' is 64 x 32"):
        calibrate.weights(str(base), None, {tiny.Q0: (64, 32)}, CPU)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibrate": "model"}, "give --ratio or --budget"),
        ({"calibrate": "model", "max_error": 0.1}, "give --ratio or --budget"),
        ({"calibrate": "model", "method": "svd"}, "for --method auto"),
        ({"prompts": "file", "ratio": 8}, "prompts are for --calibrate"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lorazip.Spec(**options)  # type: ignore[arg-type]


def test_missing_prompts_end_in_one_line(
    base: Path, zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (
        ("gone.txt", None),
        ("empty.txt", "\n"),
        ("other.jsonl", json.dumps({"text": "x"})),
        ("some.jsonl", json.dumps({"input": "x"}) + "\n" + json.dumps({"inputs": "y"})),
        ("prompts.md", "x"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        arguments = ["--calibrate", str(base), "--prompts", str(path), "--ratio", "8"]
        with pytest.raises(SystemExit) as done:
            main(["compress", str(zoo), "-o", str(tmp_path / "out"), *arguments])
        said = capsys.readouterr().err
        assert done.value.code == 2 and name in said and "Traceback" not in said
        assert not (tmp_path / "out").exists()


def test_other_prompts_are_another_job(base: Path, zoo: Path, tmp_path: Path) -> None:
    file = Path(prompts(tmp_path))
    spec = lorazip.Spec(ratio=8, calibrate=str(base), prompts=str(file))
    first = job.run([zoo], spec, tmp_path / "out")
    assert job.run([zoo], spec, tmp_path / "out", resume=True).bundle_bytes == first.bundle_bytes
    file.write_text("another text\n")
    with pytest.raises(TargetError, match="made with other options or inputs"):
        job.run([zoo], spec, tmp_path / "out", resume=True)


def test_an_adapter_joins_a_calibrated_bundle(base: Path, zoo: Path, tmp_path: Path) -> None:
    (new,) = tiny.make_adapters(tmp_path, ["new"])
    bundle = lorazip.compress([zoo], lorazip.Spec(ratio=8, calibrate=str(base)), tmp_path / "team")
    worst = max(adapter.error for adapter in bundle.manifest.adapters)
    bundle, _ = join.add(tmp_path / "team", [str(new)])
    assert bundle.adapter("new").record.error <= worst
