"""Rotary position embedding together with the write of keys and values into their slots."""
