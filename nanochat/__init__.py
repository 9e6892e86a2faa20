"""Saint Iberis: a whole small LLM, from raw text to a chat page, around a hybrid convolution-attention GPT."""
