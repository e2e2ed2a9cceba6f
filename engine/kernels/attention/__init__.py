"""Causal attention over paged KV: decodes and prompt chunks in one packed, variable-length batch."""
