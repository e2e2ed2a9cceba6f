"""The messages of every stream (baton.proto) and their generated Python. Belongs here: nothing that acts on them."""

PROTOCOL_VERSION = 2
"""Raised when an older peer could misread a message; ends that only differ in unknown fields stay compatible."""
