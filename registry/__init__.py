"""Who may be there: worker id -> address, role, revision, kept where workers announce and gateways look.

Belongs here: membership, and its three homes (a folder, Redis, DNS). Nothing else is kept: load, caches and phases flow
straight from worker to gateway.
Does not belong here: any decision about a request. What is found here is a hint; `Hello` is the truth.

    worker:   keeper.py announces an entry again and again until it is withdrawn
    gateway:  table.py reads every home, and keeps the last it knew of each while that one is silent
"""
