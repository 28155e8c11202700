import os

import torch


# Triton's interpreter tests the kernel without a GPU. It has to be chosen before anything imports triton, since
# triton's own library is decorated then, and other libraries import it on the way.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
