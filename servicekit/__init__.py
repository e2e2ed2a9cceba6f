"""What every Baton process needs around its work: configuration, logs, health, metrics, start and end.

Belongs here: things that gateway, prefill and decode workers do alike and that know nothing of tokens or KV.
Does not belong here: anything that imports engine, kvtransfer or a service.
"""
