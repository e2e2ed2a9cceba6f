"""Everything the engine raises on purpose.

EngineError
├── ConfigInvalid          a value of EngineConfig breaks a rule; permanent
├── RequestInvalid         this engine can never run the request; permanent, names value and limit
├── EngineDraining         no new requests are taken; retry elsewhere
├── RequestUnknown         the key names no live request: it ended, or never was
├── PhaseConflict          the call does not fit the request's phase: a bug of the caller
└── EngineCrashed          a step failed; nothing the engine holds can be trusted any more

A broken invariant of our own is an AssertionError, never one of these.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error the engine raises on purpose."""


class ConfigInvalid(EngineError):
    """A field of EngineConfig breaks a rule."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"{field} is {value!r}, but {rule}")
        self.field = field
        self.value = value
        self.rule = rule


class RequestInvalid(EngineError):
    """The request can never run on this engine."""

    def __init__(self, field: str, value: object, limit: object, explanation: str) -> None:
        super().__init__(f"{field} is {value}, the limit is {limit}: {explanation}")
        self.field = field
        self.value = value
        self.limit = limit


class EngineDraining(EngineError):
    """The engine finishes what it has and takes nothing new."""


class RequestUnknown(EngineError):
    """No live request has this key."""

    def __init__(self, key: int) -> None:
        super().__init__(f"request {key} has ended or was never started")
        self.key = key


class PhaseConflict(EngineError):
    """A call came in a phase of the request in which it means nothing."""

    def __init__(self, key: int, call: str, phase: str) -> None:
        super().__init__(f"{call} for request {key}, which is {phase}")
        self.key = key


class EngineCrashed(EngineError):
    """A step raised; the engine thread has stopped."""
