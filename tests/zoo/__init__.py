"""A zoo of models and losses: each trained by harness, in every layout, against plain PyTorch."""
