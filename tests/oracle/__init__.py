"""The oracle: transformers + PEFT on small random checkpoints, and the comparison with it."""

import torch
from transformers.utils import logging

# The matrices are tiny: one thread is fastest, and the engine under test uses the other cores.
torch.set_num_threads(1)
logging.disable_progress_bar()  # type: ignore[no-untyped-call]
