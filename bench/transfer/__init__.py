"""Hand-over bandwidth and latency against a raw copy over the same medium, in one run: `make bench-transfer`.

Two processes on this machine. P holds the KV blocks (`prefill`), D is this process (`decode`) and moves them by every
way in turn, each round over other blocks than the last, so that neither end finds them in its caches:

    raw         what the medium gives. grpc: 1 MiB writes over TCP, received into a buffer that is there. shm: numpy's
                copy out of the mapped memory, one thread. nixl: one read of one region, of the agent itself (UCX: see
                UCX_TLS)
    blocks      the transport: neighbouring blocks, nothing verified
    + digest    the same, and the digest of each block is taken as it arrives
    fragmented  the same as `blocks`, where no two are neighbours at either end
    fetch       the whole hand-over, order to commit, over the real control stream and an engine that computes nothing:
                what is left after subtracting the raw copy of the same bytes is the protocol
    hand-over   the same in the order of a real prefill: the prompt's blocks are filled a step of 192 tokens at a time,
                and published as they are digested. From the last block's last byte at P to the commit at D, less the
                raw copy of the last step's bytes: what disaggregation adds to a prompt's first token

The share of safety in TTFT (`safety`) is measured against a real service with SmolLM2 in the same run.

`cases` says what is moved and for how long, `table` and `plot` show it.
"""
