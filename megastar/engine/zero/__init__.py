"""The two DeepSpeed engines and their partitions. The only package that imports deepspeed."""
