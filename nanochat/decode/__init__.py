"""Decoding many sequences at once: the machine room behind engine.py."""
