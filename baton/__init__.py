"""The `baton` command and its local mode: the same LLMService YAML run as processes of this machine.

Belongs here: starting, watching and stopping processes, and talking to people. Does not belong here: tokens, KV, torch.
"""
