"""`python -m weft`, for torchrun."""

from weft.cli.app import main

main()
