"""Helpers that test modules share: models, servers, a browser, and short training runs."""
