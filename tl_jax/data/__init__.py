"""Images in, batches out: sources, decoding and augmentation, and batches indexed by step. Numpy and Pillow, no jax."""
