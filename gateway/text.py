"""Text to token ids: chat template and tokenizer, off the event loop when the input is big, within a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import modelfiles
from gateway.chat_template import ChatTemplate, flatten_content
from gateway.detokenize import Detokenizer
from gateway.errors import InvalidRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")

INLINE_CHARS = 8_192  # about 1 ms of tokenizing; more would be felt by the other streams
DEADLINE_S = 10.0


class TextService:
    """The model's tokenizer and template, shared by all requests."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.detokenizer = Detokenizer(tokenizer)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")

    @classmethod
    def load(cls, model: Path) -> TextService:
        source = modelfiles.load_chat_template(model)
        special = modelfiles.load_special_tokens(model)
        names = {"bos_token": special.bos, "eos_token": special.eos, "unk_token": special.unk, "pad_token": special.pad}
        known = {name: text for name, text in names.items() if text is not None}
        template = ChatTemplate(source, known) if source is not None else None
        return cls(modelfiles.load_tokenizer(model), template)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return await self._run(lambda: self._encode(text, add_special_tokens), len(text))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        add_special_tokens: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Render the messages and tokenize them. Raises: InvalidRequest."""
        template = self.template
        if template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; use /v1/completions with a prompt", param="messages"
            )
        flat = [{**message, "content": flatten_content(message.get("content"))} for message in messages]

        def work() -> list[int]:
            text = template.render(
                flat,
                variables,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            return self._encode(text, add_special_tokens)

        return await self._run(work, sum(len(str(message["content"])) for message in flat) + 64 * len(flat))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    async def _run(self, work: Callable[[], T], num_chars: int) -> T:
        if num_chars <= INLINE_CHARS:
            return work()
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.wait_for(future, DEADLINE_S)
        except TimeoutError as error:
            raise InvalidRequest(
                f"the prompt of {num_chars} characters could not be prepared within {DEADLINE_S:g} s; shorten it"
            ) from error
