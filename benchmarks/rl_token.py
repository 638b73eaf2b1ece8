"""Cost of one GRPO step: `python -m benchmarks.rl_token [--steps 30] [--json]`. A table, or one JSON object.

A step is 32 completions of exactly 32 tokens, their rewards, advantages, forward, backward, clipping, AdamW; on one thread. TRL's
GRPOTrainer runs beside ours where it is installed: between two of its steps ours take theirs. CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from rl_core.methods.grpo import GRPO
from rl_core.models.hf import HFModel
from rl_core.models.lm import LM, Shape
from rl_core.trainers.token import Schedule, Trainer

PROMPTS, RESPONSES, PROMPT_TOKENS, TOKENS = 4, 8, 8, 32
WARM = 5
"""Steps of each side before the clock counts; in one of them operations are counted."""
SMALL = Shape(vocabulary=64, positions=PROMPT_TOKENS + TOKENS, layers=3, width=96, heads=4)
LARGE = Shape(vocabulary=64, positions=PROMPT_TOKENS + TOKENS, layers=6, width=256, heads=8)
END = SMALL.vocabulary
"""End and padding: a token that no head can write, so that every completion has all its tokens."""
BAR, IMPORT_BAR = 0.5, 2.5


@dataclass(frozen=True)
class Even:
    """Prompts at random, reward: the share of even tokens. Nothing that would cost time."""

    max_tokens: int = TOKENS

    def prompts(self, count: int, rng: Generator) -> Tensor:
        """(count, 8)."""
        return torch.randint(0, SMALL.vocabulary, (count, PROMPT_TOKENS), generator=rng)

    def reward(self, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """(n,)."""
        return (responses % 2 == 0).float().mean(dim=1)


@dataclass(frozen=True)
class Row:
    """What a step of one side costs."""

    side: str
    parameters: int
    cpu_ms: float
    sampling_ms: float | None
    """Of it; None: not measured apart."""
    operations: int
    """That torch dispatches in a step, views and the backward pass included."""
    flops_floor_ms: float
    """The step's arithmetic at the measured rate of a large product."""
    operations_floor_ms: float
    """As many operations, each on one number."""
    ratio: float | None
    """To TRL's CPU time."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched while it is entered."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """CPU seconds of one call; on a GPU wall seconds until it is done."""
    if device == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def product_rate(device: str = "cpu", size: int = 1024) -> float:
    """Operations a second of a product of two large matrices in float32, which no step can beat."""
    a = torch.rand(size, size, device=device)
    return 2 * size**3 / statistics.median(seconds(lambda: a @ a, device) for _ in range(15))


def operation_seconds(repeats: int = 20_000) -> float:
    """CPU time of an operation on one number, asked for from Python."""
    a = torch.rand(1)
    return statistics.median(seconds(lambda: [a.add(a) for _ in range(repeats)]) / repeats for _ in range(5))


def forward_flops(shape: Shape, weights: int, rows: int) -> float:
    """Of a pass over prompts and completions but for the last token; sampling with a cache is one, training with backward three."""
    read = PROMPT_TOKENS + TOKENS - 1
    return rows * (2 * weights * read + 4 * shape.layers * shape.width * read * (read + 1) / 2)


def parameters(model: nn.Module, *, multiplied: bool = False) -> int:
    """How many; or those that are multiplied for every token, not looked up."""
    looked_up = sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Embedding))
    return sum(weight.numel() for weight in model.parameters()) - multiplied * looked_up


def hugging_face(kind: str) -> PreTrainedModel:
    """A model of transformers. gpt2: the functions of the small model, as many weights; llama: about as many."""
    sizes: dict[str, Any] = {
        "vocab_size": SMALL.vocabulary, "hidden_size": SMALL.width, "num_hidden_layers": SMALL.layers, "bos_token_id": None,
        "num_attention_heads": SMALL.heads, "max_position_embeddings": SMALL.positions, "eos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=256))
    return GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Turns(TrainerCallback):
    """Between two steps of TRL others take theirs. All that lies between two ends of a step is TRL's: its data and metrics, too."""

    def __init__(self, others: Callable[[], object]) -> None:
        self.others, self.costs, self.started = others, list[float](), 0.0
        self.operations: Any = Operations()  # type: ignore[no-untyped-call]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps are counted from one."""
        if state.global_step > WARM:
            self.costs.append(time.process_time() - self.started)
        if state.global_step == WARM - 1:
            self.operations.__exit__(None, None, None)
        self.others()
        if state.global_step == WARM - 2:
            self.operations.__enter__()
        self.started = time.process_time()


def even_tokens(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """Even's reward, as TRL asks for it."""
    return [sum(token % 2 == 0 for token in one) / len(one) for one in completion_ids]


def trl_trainer(model: PreTrainedModel, steps: int, folder: str, turns: Turns, *, shipped: bool = False) -> Any:
    """TRL's, at our step's work. `shipped`: in bfloat16 and with activations computed twice, as its defaults are."""
    trl, datasets, tokenizers, transformers = map(import_module, ("trl", "datasets", "tokenizers", "transformers"))
    words = {**{f"t{token}": token for token in range(SMALL.vocabulary)}, "end": END}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    prompts = Even().prompts(PROMPTS * steps, Generator().manual_seed(0)).tolist()
    config = trl.GRPOConfig(
        output_dir=folder, per_device_train_batch_size=PROMPTS * RESPONSES, gradient_accumulation_steps=1, num_iterations=1,
        num_generations=RESPONSES, max_completion_length=TOKENS, max_steps=steps, temperature=1.0, beta=0.0, max_grad_norm=1.0,
        learning_rate=3e-4, weight_decay=0.01, lr_scheduler_type="constant", gradient_checkpointing=shipped, bf16=shipped,
        use_cpu=True, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    found = trl.GRPOTrainer(
        model,
        reward_funcs=even_tokens,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": [" ".join(f"t{token}" for token in one) for one in prompts]}),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="end", pad_token="end"),
        callbacks=[turns],
    )
    found.remove_callback(PrinterCallback)
    return found


def measured(steps: int, kind: str, *, shipped: bool) -> list[Row]:
    """TRL where it is installed, and ours with the same model and with the small one, turn and turn about."""
    torch.manual_seed(0)
    model, schedule = hugging_face(kind), Schedule(prompts=PROMPTS, responses=RESPONSES)
    models: dict[str, Any] = {
        f"ours, the same {kind}": HFModel(copy.deepcopy(model), END, END), "ours, the small model": LM(SMALL),
    }  # fmt: skip
    ours = {name: Trainer(GRPO(), Even(), schedule, one, end=END, pad=END) for name, one in models.items()}
    costs = {name: list[float]() for name in ours}

    def turn() -> None:
        for name, one in ours.items():
            costs[name].append(seconds(one.advance))

    turns = Turns(turn)
    if importlib.util.find_spec("trl"):
        with tempfile.TemporaryDirectory() as folder:
            trl_trainer(model, WARM + steps, folder, turns, shipped=shipped).train()
    else:
        for _ in range(WARM + steps):
            turn()
    rate, operation = product_rate(), operation_seconds()
    peer = statistics.median(turns.costs) if turns.costs else None

    def row(name: str, one: nn.Module, cost: float, sampling: float | None, operations: int) -> Row:
        floor = 4 * forward_flops(SMALL, parameters(one, multiplied=True), PROMPTS * RESPONSES) / rate
        return Row(
            name, parameters(one), 1e3 * cost, sampling, operations, 1e3 * floor, 1e3 * operations * operation,
            None if peer is None else cost / peer,
        )  # fmt: skip

    found = [] if peer is None else [row("TRL", model, peer, None, turns.operations.count)]
    for name, one in ours.items():
        sampling = 1e3 * statistics.median(seconds(one.collect) for _ in range(steps))
        with Operations() as operations:  # type: ignore[no-untyped-call]
            one.advance()
        found.append(row(name, models[name], statistics.median(costs[name][WARM:]), sampling, operations.count))
    return found


def import_seconds(repeats: int = 5) -> float:
    """Wall time of `import rl_core.registry` in a fresh process."""
    code = "import time; start = time.perf_counter(); import rl_core.registry; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True) for _ in range(repeats)]
    return statistics.median(float(one.stdout) for one in runs)


def on_gpu(device: str = "cuda", prompts: int = 256, responses: int = 16, size: int = 8192) -> dict[str, float]:
    """Tokens a second of the larger model, and what a roofline allows: bytes that a token reads, or products, whichever is more."""
    model, rows, tokens = LM(LARGE).to(device), prompts * responses, prompts * responses * TOKENS
    schedule = Schedule(prompts=prompts, responses=responses, micro_prompts=prompts // 4)
    one = Trainer(GRPO(), Even(), schedule, model, end=END, pad=END)
    found = one.collect()
    batch = one.credited(found)
    one.update(found, batch)
    sampling = statistics.median(seconds(one.collect, device) for _ in range(5))
    training = statistics.median(seconds(lambda: one.update(found, batch), device) for _ in range(5))
    large = torch.zeros(1 << 26, device=device)
    bandwidth = 2 * 4 * large.numel() / statistics.median(seconds(large.clone, device) for _ in range(10))
    weights, rate = parameters(model, multiplied=True), product_rate(device, size)
    forward = forward_flops(LARGE, weights, rows) / rate
    kept = 2 * LARGE.layers * LARGE.width * rows * sum(PROMPT_TOKENS + place for place in range(TOKENS))
    reading = 4 * (weights * TOKENS + kept) / bandwidth
    return {
        "sampled_per_s": tokens / sampling, "sampled_roofline_per_s": tokens / max(reading, forward),
        "trained_per_s": tokens / training, "trained_roofline_per_s": tokens / (3 * forward),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [["one step", "parameters", "CPU ms", "of it sampling", "floor, flops", "operations", "floor, operations", "to TRL"]]
    for one in rows:
        floors = [f"{floor:.1f} ({floor / one.cpu_ms:.0%})" for floor in (one.flops_floor_ms, one.operations_floor_ms)]
        sampling, ratio = ("-" if value is None else f"{value:.2f}" for value in (one.sampling_ms, one.ratio))
        cells = [f"{one.parameters:,}", f"{one.cpu_ms:.1f}", sampling, floors[0], f"{one.operations:,}", floors[1], ratio]
        lines.append([one.side, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """All figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="of each side, after five that do not count")
    parser.add_argument("--model", choices=("gpt2", "llama"), default="gpt2", help="of transformers, for TRL and for ours")
    parser.add_argument("--shipped", action="store_true", help="TRL in bfloat16 with checkpoints, its defaults: not equal work")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    rows, loading = measured(options.steps, options.model, shipped=options.shipped), import_seconds()
    gpu = on_gpu() if torch.cuda.is_available() else None
    if options.json:
        figures = {"steps": [asdict(row) for row in rows], "bar": BAR, "import_s": loading, "import_bar_s": IMPORT_BAR, "gpu": gpu}
        print(json.dumps(figures))
        return
    print(table(rows))
    if not importlib.util.find_spec("trl"):
        print("TRL is not installed: ours alone. For the ratio: `pip install trl==1.16.0`")
    print(f"Bar: {BAR} of TRL's CPU time. Import of rl_core.registry: {loading:.2f} s (bar {IMPORT_BAR} s)")
    print(
        "no GPU: not measured" if gpu is None else "GPU, tokens: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in gpu.items())
    )


if __name__ == "__main__":
    main()
