"""Tasks for training and evaluation: each is a list of conversations that can grade answers to them."""
