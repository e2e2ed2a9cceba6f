"""Batch-invariant GEMM: a row's result depends on that row and the weights, never on the other rows or their number."""
