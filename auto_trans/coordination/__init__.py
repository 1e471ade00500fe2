"""Many ranks, one output directory: who converts, who waits, who failed. Knows nothing of tensors."""
