"""`python -m baton`: the same as the `baton` script."""

from baton.cli import main

main()
