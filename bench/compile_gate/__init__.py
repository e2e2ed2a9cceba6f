"""Compiles every kernel that ships ahead of time, for GPUs that need not be there, and refuses what would be slow.

Belongs here: what compiling, disassembling and a datasheet can say. What only a run can say belongs in `bench.gpu`.
"""
