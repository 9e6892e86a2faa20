"""Saint Iberis: a whole small LLM from raw text to a chat page, a hybrid of convolution and attention."""
