"""Between protobuf and the engine's plain data. Conversions only; what a value means is decided elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine.messages import EngineLoad
from engine.request import SampledToken, SamplingParams
from engine.worker import ReplicaIdentity
from kvtransfer.protocol import baton_pb2 as pb


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        num_logprobs=message.num_logprobs,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        min_p=message.min_p,
    )


def token_logprobs(token: SampledToken) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs]


def first_token_messages(tokens: Mapping[int, SampledToken]) -> list[pb.FirstToken]:
    return [
        pb.FirstToken(choice=choice, token_id=token.token_id, logprob=token.logprob, top_logprobs=token_logprobs(token))
        for choice, token in sorted(tokens.items())
    ]


def first_tokens(messages: Iterable[pb.FirstToken]) -> dict[int, SampledToken]:
    """By choice. The sequence id is the decode engine's to know; it takes the token, not the id."""
    return {
        message.choice: SampledToken(
            sequence_id=-1,
            token_id=message.token_id,
            logprob=message.logprob,
            top_logprobs=tuple((top.token_id, top.logprob) for top in message.top_logprobs),
        )
        for message in messages
    }


def worker_load(load: EngineLoad) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        step_counter=load.step_counter,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_waiting_tokens=load.num_waiting_tokens,
        num_blocks_free=load.num_blocks_free,
        num_blocks_total=load.num_blocks_total,
        draining=load.draining,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        predicted_step_s=load.predicted_step_s,
        num_promised=load.num_promised,
        num_filling=load.num_filling,
        num_held_tokens=load.num_held_tokens,
    )


def worker_info(
    identity: ReplicaIdentity,
    *,
    worker_id: str,
    role: pb.Role,
    boot_id: bytes,
    model_id: str,
    host_id: str,
    shared_memory_socket: str,
    nixl: pb.NixlMemory | None,
    num_readable_blocks: int,
    version: str,
    revision: str,
) -> pb.WorkerInfo:
    return pb.WorkerInfo(
        worker_id=worker_id,
        role=role,
        boot_id=boot_id,
        model_id=model_id,
        layout_fingerprint=identity.layout_fingerprint,
        numerics_fingerprint=identity.numerics_fingerprint,
        deterministic=identity.deterministic,
        max_model_len=identity.max_model_len,
        block_size=identity.block_size,
        block_bytes=identity.block_bytes,
        num_blocks=num_readable_blocks,
        shared_memory_socket=shared_memory_socket,
        nixl=nixl,
        host_id=host_id,
        max_num_seqs=identity.max_num_seqs,
        version=version,
        revision=revision,
    )
