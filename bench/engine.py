"""The engine's CPU runner against transformers, in one run.

    python -m bench.engine [--json] [--quick]

SmolLM2-135M's shape with random weights, or `--model PATH`; fp32, two threads. Each figure is the median of pairs: both
sides are timed in turn, and the ratio is the median of the pairs' ratios, so that a noisy neighbour hits both. The
second ratio is of processor time, which says something even on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.batch import Batch, Chunk
from engine.kernels.attention.native import attention
from engine.kernels.native.library import NativeContext
from engine.kernels.native.program import Program, StepArrays
from engine.kv_memory import KVMemory
from engine.models.weights import SourceTensor
from engine.request import SamplingParams, Sequence
from engine.runner import ModelRunner, kv_shape
from modelfiles.config import ModelConfig
from modelfiles.read_config import load_config
from modelfiles.weights import open_weights

PROMPT = 128


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `ratio` is ours / theirs by the clock, `cpu_ratio` by processor time; more is better."""

    name: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    cpu_ratio: float
    theirs_name: str = "transformers"


@dataclass(frozen=True, slots=True)
class Timing:
    """One run: seconds by the clock and of the process's threads."""

    wall: float
    cpu: float


class Ours:
    """A runner with sequences whose blocks are handed out one after another."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, SourceTensor], block_size: int, threads: int, **options: Any
    ) -> None:
        self.block_size = block_size
        self.kv = KVMemory(kv_shape(config, block_size), 16384 // block_size)
        self.runner = ModelRunner(config, weights, self.kv, num_threads=threads, **options)
        self._vocab = config.vocab_size

    def sequences(self, count: int, length: int, room: int) -> list[Sequence]:
        """`count` prompts of `length` tokens with blocks for `length + room`."""
        blocks = -(-(length + room) // self.block_size)
        generator = np.random.default_rng(0)
        return [
            Sequence(
                sequence_id=i,
                request_key=i,
                choice=0,
                sampling=SamplingParams(temperature=0, max_tokens=room),
                token_ids=generator.integers(3, self._vocab, length).tolist(),
                num_prompt_tokens=length,
                block_table=array("i", range(i * blocks, (i + 1) * blocks)),
            )
            for i in range(count)
        ]

    def prefill(self, sequence: Sequence) -> None:
        """The whole prompt in one chunk, and its first token."""
        tokens = self.runner.execute(Batch((), (Chunk(sequence, 0, sequence.num_tokens, (sequence,)),)))
        sequence.token_ids.append(tokens[0].token_id)

    def decode(self, sequences: list[Sequence]) -> None:
        """One token for each."""
        chunks = tuple(Chunk(s, s.num_tokens - 1, 1, (s,)) for s in sequences)
        for sequence, token in zip(sequences, self.runner.execute(Batch((), chunks)), strict=True):
            sequence.token_ids.append(token.token_id)


class Theirs:
    """transformers with its dynamic cache, a plain step loop (its fastest way in research/performance.md)."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._vocab = self.model.config.vocab_size

    @torch.inference_mode()
    def prefill(self, count: int, length: int) -> tuple[Any, torch.Tensor]:
        ids = torch.randint(3, self._vocab, (count, length))
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        return out.cache, out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def decode(self, cache: Any, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
        out = self.model(tokens, cache=cache, use_cache=True)
        return out.cache, out.logits[:, -1:].argmax(-1)


def bench_prefill(ours: Ours, theirs: Theirs, length: int, repeats: int) -> Figure:
    """Tokens per second of one prompt."""
    prompt = ours.sequences(1, length, 8)[0]

    def run_ours() -> None:
        del prompt.token_ids[length:]
        ours.prefill(prompt)

    pairs = _pairs(run_ours, lambda: theirs.prefill(1, length), repeats)
    return _figure(f"prefill {length}", "tok/s", length, pairs)


def bench_decode(ours: Ours, theirs: Theirs, batch: int, steps: int, repeats: int) -> Figure:
    """Tokens per second of a batch after prompts of 128 tokens."""
    sequences = ours.sequences(batch, PROMPT, steps * (repeats + 1) + 2)
    for sequence in sequences:
        ours.prefill(sequence)
    state = theirs.prefill(batch, PROMPT)

    def run_ours() -> None:
        for _ in range(steps):
            ours.decode(sequences)

    def run_theirs() -> None:
        nonlocal state
        for _ in range(steps):
            state = theirs.decode(*state)

    return _figure(f"decode b{batch}", "tok/s", batch * steps, _pairs(run_ours, run_theirs, repeats))


def bench_deterministic(fast: Ours, deterministic: Ours, repeats: int) -> list[Figure]:
    """What deterministic mode costs against fast mode."""
    figures = []
    for length in (512,):
        prompts = [side.sequences(1, length, 8)[0] for side in (deterministic, fast)]

        def again(side: Ours, prompt: Sequence, length: int = length) -> None:
            del prompt.token_ids[length:]
            side.prefill(prompt)

        pairs = _pairs(lambda p=prompts[0]: again(deterministic, p), lambda p=prompts[1]: again(fast, p), repeats)
        figures.append(_figure(f"deterministic prefill {length}", "tok/s", length, pairs, "fast mode"))
    for batch in (1, 8, 32):
        sides = [(side, side.sequences(batch, PROMPT, 64)) for side in (deterministic, fast)]
        for side, sequences in sides:
            for sequence in sequences:
                side.prefill(sequence)
        (a, x), (b, y) = sides
        pairs = _pairs(
            lambda a=a, x=x: [a.decode(x) for _ in range(4)], lambda b=b, y=y: [b.decode(y) for _ in range(4)], repeats
        )
        figures.append(_figure(f"deterministic decode b{batch}", "tok/s", batch * 4, pairs, "fast mode"))
    return figures


def bench_attention(
    config: ModelConfig, threads: int, block_size: int, batch: int, context: int, repeats: int
) -> Figure:
    """GB/s of KV that one decode's attention reads, against a plain copy's read of as many bytes in the same run."""
    kv = KVMemory(kv_shape(config, block_size), batch * context // block_size)
    kv.tensor.normal_()
    heads, dim = config.num_heads, config.head_dim
    q, out = torch.randn(batch, heads * dim), torch.empty(batch, heads * dim)
    table = np.random.default_rng(0).permutation(kv.num_blocks).astype(np.int32)
    step = StepArrays(
        token_ids=np.zeros(batch, np.int32),
        query_starts=np.arange(batch + 1, dtype=np.int32),
        positions=np.full(batch, context - 1, np.int32),
        table_offsets=np.arange(batch, dtype=np.int64) * (context // block_size),
        block_tables=table,
        sampled_rows=np.zeros(0, np.int32),
        rope_cos=torch.empty(0),
        rope_sin=torch.empty(0),
    )
    ops = [attention(q, kv.tensor, layer, heads, out, dim**-0.5) for layer in range(config.num_layers)]
    context_ = NativeContext(threads)
    program = Program(context_, ops)
    read = config.num_layers * 2 * config.num_kv_heads * dim * 4 * batch * context
    plain = torch.ones(read // 4)
    pairs = _pairs(lambda: program.run(step), lambda: plain.sum(), repeats)
    context_.close()
    return _figure(f"attention b{batch} x {context}, blocks of {block_size}", "GB/s", read / 1e9, pairs, "torch sum")


def bench_block_sizes(config: ModelConfig, weights: Mapping[str, SourceTensor], threads: int) -> list[dict[str, float]]:
    """Decode b8 at context 1,024 and prefill 512 for every block size, in tokens per second of processor time times
    threads: what the default is chosen by.
    """
    rows = []
    for block_size in (1, 4, 8, 16, 32, 64, 128):
        ours = Ours(config, weights, block_size, threads)
        sequences = ours.sequences(8, 1024, 128)
        for sequence in sequences:
            ours.prefill(sequence)
        decode = statistics.median(_time(lambda o=ours, s=sequences: o.decode(s)).cpu for _ in range(15))
        prompt = ours.sequences(1, 512, 8)[0]
        prefill = []
        for _ in range(3):
            del prompt.token_ids[512:]
            prefill.append(_time(lambda o=ours, p=prompt: o.prefill(p)).cpu)
        speeds = {"decode b8x1024": 8 / decode, "prefill 512": 512 / min(prefill)}
        rows.append({"block_size": block_size, **{name: threads * speed for name, speed in speeds.items()}})
        ours.runner.close()
    return rows


def _pairs(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> list[tuple[Timing, Timing]]:
    ours()
    theirs()
    return [(_time(ours), _time(theirs)) for _ in range(repeats)]


def _time(run: Callable[[], object]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def _figure(
    name: str, unit: str, amount: float, pairs: list[tuple[Timing, Timing]], theirs_name: str = "transformers"
) -> Figure:
    ours, theirs = (statistics.median(pair[i].wall for pair in pairs) for i in (0, 1))
    ratio = statistics.median(b.wall / a.wall for a, b in pairs)
    cpu_ratio = statistics.median(b.cpu / a.cpu for a, b in pairs)
    return Figure(name, unit, amount / ours, amount / theirs, ratio, cpu_ratio, theirs_name)


def random_checkpoint(folder: Path) -> Path:
    """SmolLM2-135M's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Run everything and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a transformers checkpoint (default: random weights)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer figures")
    parser.add_argument("--block-sizes", action="store_true", help="compare block sizes only")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or random_checkpoint(Path(folder))
        config, weights = load_config(path), open_weights(path)
        if args.block_sizes:
            _print_block_sizes(bench_block_sizes(config, weights, args.threads), args.json)
            return
        figures = []
        for figure in _figures(config, weights, path, args):
            figures.append(figure)
            if not args.json:
                _print_figure(figure)
    if args.json:
        sys.stdout.write(json.dumps([asdict(figure) for figure in figures], indent=2) + "\n")


def _figures(
    config: ModelConfig, weights: Mapping[str, SourceTensor], path: Path, args: argparse.Namespace
) -> Iterator[Figure]:
    ours, theirs = Ours(config, weights, args.block_size, args.threads), Theirs(path)
    for batch, steps in ((1, 16), (8, 8), (32, 4)):
        yield bench_decode(ours, theirs, batch, steps, args.repeats)
    for length in (512,) if args.quick else (512, 2048):
        yield bench_prefill(ours, theirs, length, args.repeats)
    for batch, context in ((1, 2048), (8, 512), (32, 512)):
        yield bench_attention(config, args.threads, args.block_size, batch, context, args.repeats)
    if not args.quick:
        deterministic = Ours(config, weights, args.block_size, args.threads, deterministic=True)
        yield from bench_deterministic(ours, deterministic, args.repeats)


def _print_figure(f: Figure) -> None:
    line = f"{f.name:38} {f.ours:9.1f} {f.unit:6} {f.theirs_name:13} {f.theirs:9.1f}  x{f.ratio:.2f}"
    sys.stdout.write(f"{line}  cpu x{f.cpu_ratio:.2f}\n")
    sys.stdout.flush()


def _print_block_sizes(rows: list[dict[str, float]], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    for row in rows:
        sys.stdout.write("  ".join(f"{name} {value:8.1f}" for name, value in row.items()) + "\n")


if __name__ == "__main__":
    main()
