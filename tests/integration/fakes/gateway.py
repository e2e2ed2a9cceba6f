"""`python -m gateway` for tests of the supervisor."""

from fake_process import main

main("gateway")
