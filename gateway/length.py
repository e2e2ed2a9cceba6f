"""How long a request may become, held against a limit: the model's, or that of the workers there are."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class AskedLength:
    """The tokens of a request, with the names that its client knows them by."""

    num_prompt_tokens: int
    num_output_tokens: int | None  # None: as many as there is room for
    prompt_field: str
    output_field: str

    def check(self, limit: int, whose: str) -> None:
        """Raises: InvalidRequest naming the field to change, its value and the limit."""
        room = limit - self.num_prompt_tokens
        if room < 1:
            raise InvalidRequest(
                f"{self.prompt_field}: {self.num_prompt_tokens} tokens leave no room in {whose} maximum of {limit};"
                " shorten it",
                param=self.prompt_field,
            )
        if self.num_output_tokens is not None and self.num_output_tokens > room:
            raise InvalidRequest(
                f"{self.output_field}: {self.num_prompt_tokens} prompt tokens + {self.num_output_tokens} exceed {whose}"
                f" maximum of {limit}; ask for at most {room}",
                param=self.output_field,
            )
