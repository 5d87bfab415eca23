"""Programs that fine-tune, from a clone of the repository: `python -m examples.quickstart`."""

import peft_sparsegrad  # noqa: F401 - before peft, so that bitsandbytes' notice stays off the terminal
