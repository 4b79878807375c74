"""`python -m vlm`, which torchrun starts on every rank."""

from vlm.cli import main

main()
