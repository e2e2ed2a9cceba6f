"""The gateway: OpenAI's dialect over HTTP on one side, one Generate stream per decode worker on the other.

Belongs here: HTTP and SSE, chat templates, text <-> tokens, admission, routing, the token log, failover.
Does not belong here: torch, KV memory, anything that a second gateway replica would have to know.
Start at serve.py::serve, which is the whole flow on one page.
"""
