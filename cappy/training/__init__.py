"""Training: one loop that pretrains and finetunes a scorer on whole instances."""
