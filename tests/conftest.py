"""The tests run on the CPU, also where there is a GPU: several gloo ranks, and results equal to the last bit."""

import os

if not os.environ.get("MEGASTAR_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
