"""What tests share: models, servers, browsers, and whole small runs."""
