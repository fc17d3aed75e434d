"""`python -m klimb` is `klimb`."""

from klimb.cli import main

main()
