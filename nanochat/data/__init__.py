"""Where text comes from: shards, own files, the embedded documentation, downloads."""
