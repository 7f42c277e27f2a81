"""`python -m lorazip`."""

from lorazip.cli import main

main()
