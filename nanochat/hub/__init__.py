"""Exchange of models with the Hugging Face hub and with Transformers."""
