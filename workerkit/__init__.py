"""What prefill and decode workers share: the glue between engine, kvtransfer and servicekit. Used by these two only.

Belongs here: settings, metrics, start-up and message conversion that both roles need. Does not belong here: anything
that one role alone does, or that the engine or kvtransfer could do without knowing of the other.
"""
