"""`python -m decode_service` for tests of the supervisor."""

from fake_process import main

main("decode")
