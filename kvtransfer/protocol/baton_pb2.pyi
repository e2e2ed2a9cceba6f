from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]

class Disaggregation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISAGGREGATION_AUTO: _ClassVar[Disaggregation]
    DISAGGREGATION_ALWAYS: _ClassVar[Disaggregation]
    DISAGGREGATION_NEVER: _ClassVar[Disaggregation]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_NONE: _ClassVar[FinishReason]
    FINISH_STOP: _ClassVar[FinishReason]
    FINISH_LENGTH: _ClassVar[FinishReason]

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_UNSPECIFIED: _ClassVar[EndReason]
    END_FINISHED: _ClassVar[EndReason]
    END_CANCELLED: _ClassVar[EndReason]
    END_DEADLINE: _ClassVar[EndReason]
    END_INVALID: _ClassVar[EndReason]
    END_OVERLOADED: _ClassVar[EndReason]
    END_DRAINING: _ClassVar[EndReason]
    END_INTERNAL: _ClassVar[EndReason]

class PrefillFailure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PREFILL_FAILURE_UNSPECIFIED: _ClassVar[PrefillFailure]
    PREFILL_FAILURE_OVERLOADED: _ClassVar[PrefillFailure]
    PREFILL_FAILURE_DRAINING: _ClassVar[PrefillFailure]
    PREFILL_FAILURE_INVALID: _ClassVar[PrefillFailure]
    PREFILL_FAILURE_LAYOUT: _ClassVar[PrefillFailure]
    PREFILL_FAILURE_DEADLINE: _ClassVar[PrefillFailure]
    PREFILL_FAILURE_NO_PROGRESS: _ClassVar[PrefillFailure]
    PREFILL_FAILURE_INTERNAL: _ClassVar[PrefillFailure]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
DISAGGREGATION_AUTO: Disaggregation
DISAGGREGATION_ALWAYS: Disaggregation
DISAGGREGATION_NEVER: Disaggregation
FINISH_NONE: FinishReason
FINISH_STOP: FinishReason
FINISH_LENGTH: FinishReason
END_UNSPECIFIED: EndReason
END_FINISHED: EndReason
END_CANCELLED: EndReason
END_DEADLINE: EndReason
END_INVALID: EndReason
END_OVERLOADED: EndReason
END_DRAINING: EndReason
END_INTERNAL: EndReason
PREFILL_FAILURE_UNSPECIFIED: PrefillFailure
PREFILL_FAILURE_OVERLOADED: PrefillFailure
PREFILL_FAILURE_DRAINING: PrefillFailure
PREFILL_FAILURE_INVALID: PrefillFailure
PREFILL_FAILURE_LAYOUT: PrefillFailure
PREFILL_FAILURE_DEADLINE: PrefillFailure
PREFILL_FAILURE_NO_PROGRESS: PrefillFailure
PREFILL_FAILURE_INTERNAL: PrefillFailure

class HelloRequest(_message.Message):
    __slots__ = ("protocol_version", "caller_id", "caller_boot_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CALLER_ID_FIELD_NUMBER: _ClassVar[int]
    CALLER_BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    caller_id: str
    caller_boot_id: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., caller_id: _Optional[str] = ..., caller_boot_id: _Optional[bytes] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("protocol_version", "worker", "load")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker: WorkerInfo
    load: WorkerLoad
    def __init__(self, protocol_version: _Optional[int] = ..., worker: _Optional[_Union[WorkerInfo, _Mapping[str, object]]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping[str, object]]] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "role", "boot_id", "model_id", "layout_fingerprint", "numerics_fingerprint", "deterministic", "max_model_len", "block_size", "block_bytes", "num_blocks", "shared_memory_socket", "host_id", "max_num_seqs", "version", "revision", "nixl")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_SOCKET_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    NIXL_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: Role
    boot_id: bytes
    model_id: str
    layout_fingerprint: str
    numerics_fingerprint: str
    deterministic: bool
    max_model_len: int
    block_size: int
    block_bytes: int
    num_blocks: int
    shared_memory_socket: str
    host_id: str
    max_num_seqs: int
    version: str
    revision: str
    nixl: NixlMemory
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., boot_id: _Optional[bytes] = ..., model_id: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., numerics_fingerprint: _Optional[str] = ..., deterministic: _Optional[bool] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., block_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., shared_memory_socket: _Optional[str] = ..., host_id: _Optional[str] = ..., max_num_seqs: _Optional[int] = ..., version: _Optional[str] = ..., revision: _Optional[str] = ..., nixl: _Optional[_Union[NixlMemory, _Mapping[str, object]]] = ...) -> None: ...

class NixlMemory(_message.Message):
    __slots__ = ("agent_metadata", "blocks_address", "control_address", "only_rdma", "device_id")
    AGENT_METADATA_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ONLY_RDMA_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    agent_metadata: bytes
    blocks_address: int
    control_address: int
    only_rdma: bool
    device_id: int
    def __init__(self, agent_metadata: _Optional[bytes] = ..., blocks_address: _Optional[int] = ..., control_address: _Optional[int] = ..., only_rdma: _Optional[bool] = ..., device_id: _Optional[int] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("step_counter", "num_running", "num_waiting", "num_waiting_tokens", "num_blocks_free", "num_blocks_total", "draining", "prefill_tokens_per_s", "predicted_step_s", "num_promised", "num_filling", "num_held_tokens")
    STEP_COUNTER_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_STEP_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMISED_FIELD_NUMBER: _ClassVar[int]
    NUM_FILLING_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    step_counter: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks_free: int
    num_blocks_total: int
    draining: bool
    prefill_tokens_per_s: float
    predicted_step_s: float
    num_promised: int
    num_filling: int
    num_held_tokens: int
    def __init__(self, step_counter: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., num_blocks_free: _Optional[int] = ..., num_blocks_total: _Optional[int] = ..., draining: _Optional[bool] = ..., prefill_tokens_per_s: _Optional[float] = ..., predicted_step_s: _Optional[float] = ..., num_promised: _Optional[int] = ..., num_filling: _Optional[int] = ..., num_held_tokens: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("load", "num_pending")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_FIELD_NUMBER: _ClassVar[int]
    load: WorkerLoad
    num_pending: int
    def __init__(self, load: _Optional[_Union[WorkerLoad, _Mapping[str, object]]] = ..., num_pending: _Optional[int] = ...) -> None: ...

class GenerateUp(_message.Message):
    __slots__ = ("start", "cancel", "heartbeat")
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    start: GenerateRequest
    cancel: CancelAttempt
    heartbeat: Heartbeat
    def __init__(self, start: _Optional[_Union[GenerateRequest, _Mapping[str, object]]] = ..., cancel: _Optional[_Union[CancelAttempt, _Mapping[str, object]]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping[str, object]]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "num_logprobs", "repetition_penalty", "frequency_penalty", "presence_penalty", "min_p")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    num_logprobs: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    min_p: float
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., num_logprobs: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., min_p: _Optional[float] = ...) -> None: ...

class ChoiceLog(_message.Message):
    __slots__ = ("choice", "committed_token_ids", "finished")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    choice: int
    committed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: bool
    def __init__(self, choice: _Optional[int] = ..., committed_token_ids: _Optional[_Iterable[int]] = ..., finished: _Optional[bool] = ...) -> None: ...

class PrefillCandidate(_message.Message):
    __slots__ = ("worker_id", "address", "boot_id", "predicted_queue_s", "prefill_tokens_per_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    boot_id: bytes
    predicted_queue_s: float
    prefill_tokens_per_s: float
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., boot_id: _Optional[bytes] = ..., predicted_queue_s: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("key", "request_id", "attempt", "prompt_token_ids", "sampling", "choices", "prefill_candidates", "disaggregation", "deadline_s", "cache_salt", "ttft_objective_s")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    DISAGGREGATION_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TTFT_OBJECTIVE_S_FIELD_NUMBER: _ClassVar[int]
    key: int
    request_id: str
    attempt: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceLog]
    prefill_candidates: _containers.RepeatedCompositeFieldContainer[PrefillCandidate]
    disaggregation: Disaggregation
    deadline_s: float
    cache_salt: bytes
    ttft_objective_s: float
    def __init__(self, key: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping[str, object]]] = ..., choices: _Optional[_Iterable[_Union[ChoiceLog, _Mapping[str, object]]]] = ..., prefill_candidates: _Optional[_Iterable[_Union[PrefillCandidate, _Mapping[str, object]]]] = ..., disaggregation: _Optional[_Union[Disaggregation, str]] = ..., deadline_s: _Optional[float] = ..., cache_salt: _Optional[bytes] = ..., ttft_objective_s: _Optional[float] = ...) -> None: ...

class CancelAttempt(_message.Message):
    __slots__ = ("key", "choices")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    key: int
    choices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[int] = ..., choices: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateDown(_message.Message):
    __slots__ = ("accepted", "step", "heartbeat")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    step: Step
    heartbeat: Heartbeat
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping[str, object]]] = ..., step: _Optional[_Union[Step, _Mapping[str, object]]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping[str, object]]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: int
    def __init__(self, key: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("tokens", "ended")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    ended: _containers.RepeatedCompositeFieldContainer[Ended]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping[str, object]]]] = ..., ended: _Optional[_Iterable[_Union[Ended, _Mapping[str, object]]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("key", "choice", "index", "token_id", "finish", "logprob", "top_logprobs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    key: int
    choice: int
    index: int
    token_id: int
    finish: FinishReason
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, key: _Optional[int] = ..., choice: _Optional[int] = ..., index: _Optional[int] = ..., token_id: _Optional[int] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping[str, object]]]] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("key", "reason", "message", "stats")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    key: int
    reason: EndReason
    message: str
    stats: AttemptStats
    def __init__(self, key: _Optional[int] = ..., reason: _Optional[_Union[EndReason, str]] = ..., message: _Optional[str] = ..., stats: _Optional[_Union[AttemptStats, _Mapping[str, object]]] = ...) -> None: ...

class AttemptStats(_message.Message):
    __slots__ = ("num_cached_tokens", "prefill_path", "path_reason", "prefill_worker_id", "queue_s", "prefill_s", "transfer_s", "transfer_bytes", "transport")
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PATH_FIELD_NUMBER: _ClassVar[int]
    PATH_REASON_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    num_cached_tokens: int
    prefill_path: str
    path_reason: str
    prefill_worker_id: str
    queue_s: float
    prefill_s: float
    transfer_s: float
    transfer_bytes: int
    transport: str
    def __init__(self, num_cached_tokens: _Optional[int] = ..., prefill_path: _Optional[str] = ..., path_reason: _Optional[str] = ..., prefill_worker_id: _Optional[str] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class PrefillUp(_message.Message):
    __slots__ = ("start", "credit", "acknowledge", "release", "heartbeat")
    START_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    start: StartPrefill
    credit: GrantCredit
    acknowledge: AcknowledgeBlocks
    release: ReleaseTicket
    heartbeat: Heartbeat
    def __init__(self, start: _Optional[_Union[StartPrefill, _Mapping[str, object]]] = ..., credit: _Optional[_Union[GrantCredit, _Mapping[str, object]]] = ..., acknowledge: _Optional[_Union[AcknowledgeBlocks, _Mapping[str, object]]] = ..., release: _Optional[_Union[ReleaseTicket, _Mapping[str, object]]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping[str, object]]] = ...) -> None: ...

class StartPrefill(_message.Message):
    __slots__ = ("transfer_id", "request_id", "token_ids", "num_blocks_held", "sampling", "choices", "layout_fingerprint", "cache_salt", "deadline_s", "ttft_left_s")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_LEFT_S_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_blocks_held: int
    sampling: SamplingParams
    choices: _containers.RepeatedScalarFieldContainer[int]
    layout_fingerprint: str
    cache_salt: bytes
    deadline_s: float
    ttft_left_s: float
    def __init__(self, transfer_id: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_blocks_held: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping[str, object]]] = ..., choices: _Optional[_Iterable[int]] = ..., layout_fingerprint: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., deadline_s: _Optional[float] = ..., ttft_left_s: _Optional[float] = ...) -> None: ...

class GrantCredit(_message.Message):
    __slots__ = ("ticket", "num_blocks")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    num_blocks: int
    def __init__(self, ticket: _Optional[bytes] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class AcknowledgeBlocks(_message.Message):
    __slots__ = ("ticket", "num_blocks")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    num_blocks: int
    def __init__(self, ticket: _Optional[bytes] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class ReleaseTicket(_message.Message):
    __slots__ = ("ticket", "transfer_id", "ok", "suspect")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    SUSPECT_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    transfer_id: int
    ok: bool
    suspect: bool
    def __init__(self, ticket: _Optional[bytes] = ..., transfer_id: _Optional[int] = ..., ok: _Optional[bool] = ..., suspect: _Optional[bool] = ...) -> None: ...

class PrefillDown(_message.Message):
    __slots__ = ("queued", "starting", "published", "manifest", "failed", "heartbeat")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    queued: Queued
    starting: Starting
    published: Published
    manifest: Manifest
    failed: PrefillFailed
    heartbeat: Heartbeat
    def __init__(self, queued: _Optional[_Union[Queued, _Mapping[str, object]]] = ..., starting: _Optional[_Union[Starting, _Mapping[str, object]]] = ..., published: _Optional[_Union[Published, _Mapping[str, object]]] = ..., manifest: _Optional[_Union[Manifest, _Mapping[str, object]]] = ..., failed: _Optional[_Union[PrefillFailed, _Mapping[str, object]]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping[str, object]]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("transfer_id", "ticket", "boot_id")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    ticket: bytes
    boot_id: bytes
    def __init__(self, transfer_id: _Optional[int] = ..., ticket: _Optional[bytes] = ..., boot_id: _Optional[bytes] = ...) -> None: ...

class Starting(_message.Message):
    __slots__ = ("ticket", "num_blocks", "num_cached_tokens")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    num_blocks: int
    num_cached_tokens: int
    def __init__(self, ticket: _Optional[bytes] = ..., num_blocks: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class BlockRef(_message.Message):
    __slots__ = ("index", "block_id", "generation", "digest", "num_tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    block_id: int
    generation: int
    digest: bytes
    num_tokens: int
    def __init__(self, index: _Optional[int] = ..., block_id: _Optional[int] = ..., generation: _Optional[int] = ..., digest: _Optional[bytes] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class Published(_message.Message):
    __slots__ = ("ticket", "blocks")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    blocks: _containers.RepeatedCompositeFieldContainer[BlockRef]
    def __init__(self, ticket: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[BlockRef, _Mapping[str, object]]]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("choice", "token_id", "logprob", "top_logprobs")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    token_id: int
    logprob: float
    top_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, choice: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping[str, object]]]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("ticket", "boot_id", "layout_fingerprint", "num_prompt_tokens", "num_blocks", "digest", "tail", "first_tokens", "queue_s", "prefill_s")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    boot_id: bytes
    layout_fingerprint: str
    num_prompt_tokens: int
    num_blocks: int
    digest: bytes
    tail: BlockRef
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    queue_s: float
    prefill_s: float
    def __init__(self, ticket: _Optional[bytes] = ..., boot_id: _Optional[bytes] = ..., layout_fingerprint: _Optional[str] = ..., num_prompt_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ..., digest: _Optional[bytes] = ..., tail: _Optional[_Union[BlockRef, _Mapping[str, object]]] = ..., first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping[str, object]]]] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ...) -> None: ...

class PrefillFailed(_message.Message):
    __slots__ = ("transfer_id", "ticket", "reason", "message")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    transfer_id: int
    ticket: bytes
    reason: PrefillFailure
    message: str
    def __init__(self, transfer_id: _Optional[int] = ..., ticket: _Optional[bytes] = ..., reason: _Optional[_Union[PrefillFailure, str]] = ..., message: _Optional[str] = ...) -> None: ...

class PullBlocks(_message.Message):
    __slots__ = ("ticket", "boot_id", "path", "indices")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    boot_id: bytes
    path: bytes
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ticket: _Optional[bytes] = ..., boot_id: _Optional[bytes] = ..., path: _Optional[bytes] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class PullDown(_message.Message):
    __slots__ = ("index", "offset", "generation", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    offset: int
    generation: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., offset: _Optional[int] = ..., generation: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
