"""`python -m meshlocal`."""

from meshlocal.cli.main import main

main()
