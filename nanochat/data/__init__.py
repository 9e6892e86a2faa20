"""Sources of text: parquet shards, the user's own files, the embedded documentation, downloads."""
