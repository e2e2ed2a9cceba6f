"""How a client wants its tokens drawn, on the way from the gateway's message to the sampler's row."""

from __future__ import annotations

import json
from array import array
from dataclasses import asdict, fields
from pathlib import Path

from engine.batch import Chunk
from engine.packing import sample_rows
from engine.request import SamplingParams, Sequence
from kvtransfer.protocol import baton_pb2 as pb
from modelfiles import load_config
from workerkit.messages import sampling_params

# Numbers that float32 holds exactly; none of them a default.
MESSAGE = pb.SamplingParams(
    max_tokens=9, min_tokens=2, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, seed=2**64 - 1, ignore_eos=True,
    stop_token_ids=[5, 6], num_logprobs=3, repetition_penalty=1.5, frequency_penalty=0.75, presence_penalty=-0.5,
)  # fmt: skip


def test_no_field_of_the_message_is_lost_on_a_worker() -> None:
    params = sampling_params(MESSAGE)
    assert {field.name for field in fields(params)} == {field.name for field in MESSAGE.DESCRIPTOR.fields}
    for name, value in asdict(params).items():
        said = getattr(MESSAGE, name)
        assert value == (tuple(said) if name == "stop_token_ids" else said), name
        assert value != getattr(SamplingParams(), name), name


def test_a_message_of_a_gateway_that_knows_no_min_p_draws_without_it() -> None:
    old = pb.SamplingParams()
    old.CopyFrom(MESSAGE)
    old.ClearField("min_p")
    assert sampling_params(pb.SamplingParams.FromString(old.SerializeToString())).min_p == 0.0


def test_every_cut_reaches_the_samplers_row(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2, **sizes}))
    sequence = Sequence(1, 1, 0, sampling_params(MESSAGE), [1, 2, 3], 3, array("i", [0]))
    ((_, row),) = sample_rows([Chunk(sequence, 0, 3, (sequence,))], load_config(tmp_path))
    assert (row.temperature, row.top_k, row.top_p, row.min_p, row.num_logprobs) == (0.5, 7, 0.25, 0.125, 3)
    assert (row.repetition, row.frequency, row.presence, row.seed) == (1.5, 0.75, -0.5, 2**64 - 1)
