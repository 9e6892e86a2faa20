"""The chat server: from an HTTP request to the worker that decodes it, and back."""
