"""`python -m moe_lm` is `moe-lm`."""

from moe_lm.cli import main

main()
