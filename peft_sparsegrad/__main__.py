"""`python -m peft_sparsegrad` is the command `peft-sparsegrad`."""

from .cli import main

if __name__ == "__main__":
    main()
