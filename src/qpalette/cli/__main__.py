"""`python -m qpalette.cli`: the same as the command `qpalette`."""

from qpalette.cli import main

main()
