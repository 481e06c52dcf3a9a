"""`python -m orin_kit` is `orin-kit`."""

from orin_kit.cli import main

main()
