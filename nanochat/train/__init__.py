"""Training: runs, the loop that all stages share, and what each stage is made of."""
