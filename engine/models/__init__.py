"""Model architectures: how weights become logits, written in terms of operations and free of any device.

Here belong the decoder, its weights and its rotary tables. Kernels belong to `engine/kernels`, files to `modelfiles`.
"""
