"""`python -m vitkd_fast` is the `vitkd` command."""

from vitkd_fast.cli import main

main()
