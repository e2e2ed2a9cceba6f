"""Local mode: one gateway and the pools as processes of this machine, watched by a supervisor.

Decisions are pure (`plan`, `restarts`); `supervisor` carries them out; `janitor` cleans up after a kill -9.
"""
