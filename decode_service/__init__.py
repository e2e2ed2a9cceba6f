"""The decode worker: owns sequences, fetches or computes their KV, streams their tokens.

Belongs here: attempts, placement of prefills, the Generate stream. Does not belong here: HTTP, Kubernetes, the
gateway's log, anything of prefill_service.
"""
