"""Can this engine ever run this request? Every refusal names the field, its value and the limit."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.errors import RequestInvalid
from engine.messages import EngineRequest


def validate_request(request: EngineRequest, config: EngineConfig) -> None:
    """Raise RequestInvalid if the request could not run to its end, even alone.

    With several choices the longest must fit alone: the others may be preempted meanwhile.
    """
    num_choices = len(request.choices)
    _refuse(num_choices < 1, "choices", num_choices, 1, "a request needs at least one unfinished choice")
    _refuse(num_choices > config.max_num_seqs, "choices", num_choices, config.max_num_seqs, "more than can run at once")
    _validate_choices(request)
    num_prompt_tokens = len(request.prompt_token_ids)
    _validate_prompt(num_prompt_tokens, config.max_model_len - 1, "max_model_len less one token of output")
    _validate_ids("prompt_token_ids", request.prompt_token_ids, config)
    max_output = min(request.sampling.max_tokens, config.max_model_len - num_prompt_tokens)
    for start in request.choices:
        name = f"choices[{start.choice}].committed_token_ids"
        committed = len(start.committed_token_ids)
        _refuse(committed >= max_output, name, committed, max_output - 1, "nothing is left to draw")
        _validate_ids(name, start.committed_token_ids, config)
    # The last token drawn is never computed, so its KV needs no slot.
    _validate_fit(num_prompt_tokens + max_output - 1, config)


def validate_prefill(request: EngineRequest, num_blocks_held: int, config: EngineConfig) -> None:
    """Raise RequestInvalid if the prompt could not be computed here, even alone."""
    num_prompt_tokens = len(request.prompt_token_ids)
    _validate_choices(request)
    _validate_prompt(num_prompt_tokens, config.max_model_len, "max_model_len")
    _validate_ids("prompt_token_ids", request.prompt_token_ids, config)
    _validate_fit(num_prompt_tokens, config)
    num_full_blocks = num_prompt_tokens // config.block_size
    is_wrong = not 0 <= num_blocks_held <= num_full_blocks
    _refuse(is_wrong, "num_blocks_held", num_blocks_held, num_full_blocks, "the prompt has only so many full blocks")
    for start in request.choices:
        name = f"choices[{start.choice}].committed_token_ids"
        committed = len(start.committed_token_ids)
        _refuse(committed > 0, name, committed, 0, "a prefill worker draws first tokens only")


def _validate_choices(request: EngineRequest) -> None:
    choices = [start.choice for start in request.choices]
    _refuse(len(set(choices)) < len(choices), "choices", choices, "each once", "a choice is listed twice")
    max_tokens = request.sampling.max_tokens
    _refuse(max_tokens < 1, "sampling.max_tokens", max_tokens, 1, "at least one token must be asked for")


def _validate_prompt(num_prompt_tokens: int, limit: int, name: str) -> None:
    _refuse(num_prompt_tokens < 1, "prompt_token_ids", "empty", 1, "a prompt needs at least one token")
    _refuse(num_prompt_tokens > limit, "prompt_token_ids", f"{num_prompt_tokens} tokens", limit, f"that is {name}")


def _validate_ids(name: str, token_ids: tuple[int, ...], config: EngineConfig) -> None:
    if config.vocab_size and token_ids:
        largest = max(token_ids)
        _refuse(largest >= config.vocab_size, name, largest, config.vocab_size - 1, "that is no token of this model")


def _validate_fit(num_tokens: int, config: EngineConfig) -> None:
    num_blocks = -(-num_tokens // config.block_size)
    explanation = f"{num_tokens} tokens in blocks of {config.block_size} can never fit the KV memory"
    _refuse(num_blocks > config.num_blocks, "KV blocks needed", num_blocks, config.num_blocks, explanation)


def _refuse(is_wrong: bool, field: str, value: object, limit: object, explanation: str) -> None:
    if is_wrong:
        raise RequestInvalid(field, value, limit, explanation)
