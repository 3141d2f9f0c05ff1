"""Published quantizers beside ours, in plain PyTorch, at the bits that they really store."""
