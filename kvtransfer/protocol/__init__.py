"""The messages of every stream (baton.proto) and their generated Python. Belongs here: nothing that acts on them."""

PROTOCOL_VERSION = 3
"""Raised when an older peer could misread a message; ends that only differ in unknown fields stay compatible."""

MAX_REQUEST_S = 86_400.0
"""Latest deadline that a request gets: a wait that nothing else ends is over after a day. (A clock refuses 1e300 s.)"""
