"""What the model is taught and measured on: each task is a list of conversations and a judge of answers."""
