"""The prefill worker: runs prompts in chunks and hands their KV out.

Belongs here: the bridge from kvtransfer's P side to the engine. Does not belong here: HTTP, Kubernetes, decode loops,
anything of decode_service.
"""
