"""`python -m fieldpost`: the command line."""

from .cli import main

main()
